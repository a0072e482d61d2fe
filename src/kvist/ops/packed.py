"""Packed weights: matrices of 8-bit or 4-bit numbers with a scale for each group of columns, as the products read them.

A weight [rows, columns] gives `rows` outputs. 64 outputs make a strip; a strip is one after another its groups of
columns, and a group is 64 scales (float16, one an output) and then its codes:

| bits | codes of a group                                                                                     |
|------|------------------------------------------------------------------------------------------------------|
| 8    | [group / 4, 64, 4] bytes: code + 128 of four columns of each output                                  |
| 4    | [group / 8, 64, 4] bytes: code + 8 of column 8 i + j in the low half, of column 8 i + 4 + j in the high |

So four columns of one output are the operand of an instruction that multiplies four bytes by four and adds them up
(vpdpbusd), and everything is read once, in the order in which it lies. A *paired* weight holds the gates and the ups of
an MLP: its first half of rows and its second; a strip then has 32 gates and the 32 ups that belong to them.

Codes are symmetric around zero. A weight is its code times its group's scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRIP = 64  # outputs
_SCALE_BYTES = 2 * STRIP
_LEAST, _MOST = 32, 256  # columns of a group
_CANDIDATES = torch.linspace(0.72, 1.06, 18)  # of the scale that covers a group's largest number, for 4 bits


@dataclass(frozen=True)
class PackedForm:
    """The shape of a packed weight: `rows` outputs of `columns` inputs in groups of `group` (a multiple of 32)."""

    rows: int
    columns: int
    bits: int
    group: int
    paired: bool = False

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def outputs(self) -> int:
        """Of the product: a gate and its up make one."""
        return self.rows // 2 if self.paired else self.rows

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that holds it: strips, and bytes of one."""
        strips = -(-self.outputs // (STRIP // 2 if self.paired else STRIP))
        return strips, self.groups * (_SCALE_BYTES + STRIP * self.group * self.bits // 8)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return self.nbytes * 8 / (self.rows * self.columns)

    def flat(self) -> list[int]:
        """As the operators take it."""
        return [self.rows, self.columns, self.bits, self.group, int(self.paired)]

    @staticmethod
    def of(flat: Sequence[int]) -> "PackedForm":
        return PackedForm(*flat[:4], bool(flat[4]))

    def places(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Strip and place in the strip of rows `start` to `start + count`."""
        row = torch.arange(start, start + count)
        if not self.paired:
            return row // STRIP, row % STRIP
        half = STRIP // 2
        output = row % self.outputs
        return output // half, output % half + half * (row // self.outputs)


def group_for(columns: int, bits: int) -> int:
    """How many columns share a scale: 32 for 4 bits. For 8 bits as many as 256, which costs the products 7 percent of
    their speed, where a number for all columns would cost none and lose more."""
    if bits == 4 or columns <= _LEAST:
        return _LEAST
    fitting = [group for group in range(_LEAST, _MOST + 1, _LEAST) if columns % group == 0]
    if fitting:
        return fitting[-1]
    return min(range(_LEAST, _MOST + 1, _LEAST), key=lambda group: (-(-columns // group) * group - columns, -group))


def empty(form: PackedForm) -> Tensor:
    """A weight of zeros [strips, bytes] uint8, to be filled by rows."""
    return torch.zeros(form.shape, dtype=torch.uint8)


def put_rows(data: Tensor, form: PackedForm, start: int, rows: Tensor) -> tuple[float, float]:
    """Make rows `start` and on of the weight `rows` [n, columns], any floating type, rounded to its codes. Returns the
    sum of the squares of what that changes, and of the rows."""
    rows = rows.float()
    codes, scales = quantize(rows, form.bits, form.group)
    put_codes(data, form, start, codes, scales)
    held = (codes.float().unflatten(1, (form.groups, -1)) * scales.float()[:, :, None]).flatten(1)
    return float((held[:, : form.columns] - rows).square().sum()), float(rows.square().sum())


def put_codes(data: Tensor, form: PackedForm, start: int, codes: Tensor, scales: Tensor) -> None:
    """The same of `codes` [n, groups * group] int8 and `scales` [n, groups] float16."""
    if not len(codes):
        return
    strips, places = form.places(start, len(codes))
    groups = data.view(form.shape[0], form.groups, -1)
    held = groups[:, :, :_SCALE_BYTES].view(torch.float16)
    held[strips, :, places] = scales
    bytes_ = groups[:, :, _SCALE_BYTES:].unflatten(2, (-1, STRIP, 4))
    if form.bits == 8:
        bytes_[strips, :, :, places] = (codes.int() + 128).to(torch.uint8).view(len(codes), form.groups, -1, 4)
        return
    both = (codes + 8).to(torch.uint8).view(len(codes), form.groups, -1, 2, 4)
    bytes_[strips, :, :, places] = both[:, :, :, 0] | both[:, :, :, 1] << 4


def get_rows(data: Tensor, form: PackedForm, start: int = 0, count: int | None = None) -> Tensor:
    """Rows of a packed weight as numbers, [n, columns] float32."""
    codes, scales = get_codes(data, form, start, count)
    numbers = codes.float().unflatten(1, (form.groups, -1)) * scales.float()[:, :, None]
    return numbers.flatten(1)[:, : form.columns]


def get_codes(data: Tensor, form: PackedForm, start: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """What `put_codes` took."""
    strips, places = form.places(start, form.rows - start if count is None else count)
    groups = data.view(form.shape[0], form.groups, -1)
    scales = groups[:, :, :_SCALE_BYTES].view(torch.float16)[strips, :, places]
    bytes_ = groups[:, :, _SCALE_BYTES:].unflatten(2, (-1, STRIP, 4))[strips, :, :, places]  # [n, groups, steps, 4]
    if form.bits == 8:
        return (bytes_.int() - 128).to(torch.int8).flatten(1), scales
    both = torch.stack((bytes_ & 15, bytes_ >> 4), dim=3)
    return (both.to(torch.int8) - 8).flatten(1), scales


def quantize(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`rows` [n, columns] float32 → codes [n, groups * group] int8 and scales [n, groups] float16.

    8 bits: the largest number of a group becomes 127. 4 bits: -8 to 7, the scale being the one of a few that loses
    least, in squares. Numbers that are not finite make their group's scale NaN.
    """
    columns = rows.shape[1]
    whole = torch.zeros(len(rows), -(-columns // group) * group)
    whole[:, :columns] = rows
    groups = whole.unflatten(1, (-1, group))
    if bits == 8:
        scales = _rounded(groups.abs().amax(2) / 127)
        codes = _codes(groups, scales, 127)
    else:
        signed = groups.gather(2, groups.abs().argmax(2, keepdim=True))[:, :, 0]
        scales, codes = _best_scales(groups, signed / -8)
    return codes.to(torch.int8).flatten(1), scales


def _best_scales(groups: Tensor, covering: Tensor) -> tuple[Tensor, Tensor]:
    best, best_codes, least = covering.half(), torch.zeros_like(groups), torch.full_like(covering, torch.inf)
    for factor in _CANDIDATES.tolist():
        scales = _rounded(covering * factor)
        codes = _codes(groups, scales, 8)
        lost = (codes * scales.float()[:, :, None] - groups).square().sum(2)
        better = lost < least
        least = torch.where(better, lost, least)
        best = torch.where(better, scales, best)
        best_codes = torch.where(better[:, :, None], codes, best_codes)
    return best, best_codes


def _codes(groups: Tensor, scales: Tensor, most: int) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    return (groups * inverse[:, :, None]).nan_to_num().round_().clamp_(-most, most if most == 127 else most - 1)


def _rounded(scales: Tensor) -> Tensor:
    """As float16: not so small that it would be zero, nor infinite where the number is not."""
    info = torch.finfo(torch.float16)
    tiny = torch.where(
        scales == 0, 0.0, torch.copysign(scales.abs().clamp(info.smallest_normal / 1024, info.max), scales)
    )
    return torch.where(scales.isfinite(), tiny, torch.nan).half()
