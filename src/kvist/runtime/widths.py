"""How many rows a step may have so that every row's bits are the same whatever stands beside it.

A library's matrix product may sum in another order when the number of rows changes (seen: one or two rows, where
it calls a matrix-vector routine). So steps are padded to one of few widths, and each width is tested on this
machine, with this model's weights' shapes, against the narrowest: a width whose rows differ in a single bit is not
used.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The head's products are the widest by far, so fewer and narrower widths are tried for them.
HEAD_LADDER = (4, 8, 16, 32, 64)
LADDER = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Widths:
    """The widths that agree, ascending."""

    agreeing: tuple[int, ...]

    @property
    def most(self) -> int:
        """The most tokens of one step."""
        return self.agreeing[-1]

    def fit(self, rows: int) -> int:
        """The narrowest width that holds `rows` rows."""
        for width in self.agreeing:
            if width >= rows:
                return width
        raise ValueError(f"a step of {rows} rows is wider than {self.most}")


def probe(products: Iterable[tuple[Tensor, Tensor | None]], ladder: tuple[int, ...] = LADDER) -> Widths:
    """Test `ladder` on one product (weight `[out, in]`, bias `[out]` or none) of each shape and dtype.

    The narrowest width is the standard that the others must equal.
    """
    agreeing = list(ladder)
    distinct = {(tuple(weight.shape), weight.dtype, bias is None): (weight, bias) for weight, bias in products}
    generator = torch.Generator().manual_seed(0)
    for weight, bias in distinct.values():
        rows = torch.empty(agreeing[-1], weight.shape[1]).normal_(generator=generator).to(weight.dtype)
        standard = torch.cat([F.linear(part, weight, bias) for part in rows.split(agreeing[0])])
        agreeing = [width for width in agreeing if _same(F.linear(rows[:width], weight, bias), standard[:width])]
    return Widths(tuple(agreeing))


def _same(ours: Tensor, expected: Tensor) -> bool:
    """Equal in every bit; NaN, which damaged weights give, counts as equal to NaN."""
    return torch.equal(ours.nan_to_num(), expected.nan_to_num())
