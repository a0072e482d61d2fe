"""Matrix products and embeddings whose weight is of floating point, or packed into whole numbers.

A packed weight takes the place of the parameter `weight`; what a decoder computes around it is then in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvist.ops import packed
from kvist.ops.packed import PackedForm


class PackedOperators(Protocol):
    """The operators of a backend over packed weights; `kvist.ops.schema` says what each does."""

    packed_linear: Callable[..., Tensor]
    packed_float: Callable[..., Tensor]
    packed_rows: Callable[..., Tensor]
    packed_project: Callable[..., Tensor]
    packed_ending: Callable[..., Tensor]
    packed_layers: Callable[..., Tensor]


# Bits of a number, and how many columns share a scale, of a parameter by its name and its columns.
Grouping = Callable[[str, int], tuple[int, int]]


def uniform(bits: int) -> Grouping:
    """All matrices in numbers of `bits` bits."""
    return lambda name, columns: (bits, packed.group_for(columns, bits))


class Weight(nn.Module):
    """A matrix `weight` [rows, columns], or what it is packed into. `paired`: its first half of rows are gates, its
    second half the ups that belong to them."""

    def __init__(self, columns: int, rows: int, paired: bool = False) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(rows, columns))
        self.codes: Tensor | None
        self.register_buffer("codes", None)
        self.form: PackedForm | None = None
        self.losses: list[tuple[float, float]] = []  # sums of squares: of what packing changed, and of the numbers
        self.paired = paired
        self.whole_rows = True

    @property
    def columns(self) -> int:
        return self.weight.shape[1] if self.form is None else self.form.columns

    def pack(self, bits: int, group: int, operators: PackedOperators) -> None:
        """Make room for a weight packed into numbers of `bits` bits, `group` columns sharing a scale, on the device of
        the parameter, which goes."""
        assert self.weight is not None
        rows, columns = self.weight.shape
        self.form = PackedForm(rows, columns, bits, group, self.paired)
        self.codes = torch.zeros(self.form.shape, dtype=torch.uint8, device=self.weight.device)
        self.weight = None
        self.operators = operators

    @property
    def operand(self) -> tuple[Tensor, list[int]]:
        """The packed weight as operators take it."""
        assert self.codes is not None
        assert self.form is not None
        return self.codes, self.form.flat()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x` [T, columns] times the packed weight, plus `bias`. Rows are made whole numbers of 8 bits, group by group,
        or rounded to bfloat16 and left at that."""
        if self.whole_rows:
            return self.operators.packed_linear(x, None, 0.0, *self.operand, bias)
        return self.operators.packed_float(x.to(torch.bfloat16).float(), *self.operand, bias)

    @property
    def is_paired(self) -> bool:
        """Whether it is packed with gates beside their ups, as fused operators take it."""
        return self.form is not None and self.form.paired

    @property
    def is_packed(self) -> bool:
        return self.form is not None


class Linear(Weight):
    """`x` [T, columns] → weight x + bias [T, rows]."""

    def __init__(self, columns: int, rows: int, bias: bool = False, paired: bool = False) -> None:
        super().__init__(columns, rows, paired)
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None
        # What adapters add to the outputs of single rows: this product, its rows and its outputs → the outputs.
        self.added: Callable[[Linear, Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x, self.bias) if self.weight is None else F.linear(x, self.weight, self.bias)
        return out if self.added is None else self.added(self, x, out)


class Embedding(Weight):
    """A row of the weight for each token; and, where the head is tied to it, the logits."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__(dim, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [T] int64 → [T, dim]."""
        if self.weight is not None:
            return F.embedding(tokens, self.weight)
        return self.operators.packed_rows(*self.operand, tokens)

    def unembed(self, hidden: Tensor) -> Tensor:
        """`hidden` [R, dim] → [R, size]."""
        if self.weight is not None:
            return F.linear(hidden, self.weight)
        return self.multiply(hidden, None)


@dataclass(frozen=True)
class PackedRows:
    """The place of some rows of a packed weight, filled as a tensor is: `place[first:last].copy_(rows)`."""

    weight: Weight
    start: int
    shape: tuple[int, int]

    def __getitem__(self, rows: slice) -> "PackedRows":
        first, last, _ = rows.indices(self.shape[0])
        return PackedRows(self.weight, self.start + first, (last - first, self.shape[1]))

    @property
    def grouping(self) -> tuple[int, int]:
        """Bits of a number, and columns that share a scale."""
        assert self.weight.form is not None
        return self.weight.form.bits, self.weight.form.group

    def put_codes(self, codes: Tensor, scales: Tensor) -> None:
        """Fill it with whole numbers and their scales as they are."""
        data, form = self.weight.codes, self.weight.form
        assert data is not None
        assert form is not None
        packed.put_codes(data, form, self.start, codes, scales)

    def copy_(self, rows: Tensor) -> None:
        codes, form = self.weight.codes, self.weight.form
        assert codes is not None
        assert form is not None
        self.weight.losses.append(packed.put_rows(codes, form, self.start, rows))


def weights_of(module: nn.Module) -> dict[str, Weight]:
    """All weights within a module, by name, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Weight)}


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """Everything that decides what a module computes, by name: parameters and packed weights."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
