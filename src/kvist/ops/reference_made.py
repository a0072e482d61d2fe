"""The reference of `attend_made`: keys that are made of the values they belong to, in plain PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.ops.attention import Rows
from kvist.ops.packing import Geometry
from kvist.ops.reference import check_attend, check_stream, decode_blocks, merge, sequences
from kvist.ops.schema import LIBRARIES, REFERENCE

# Of a stream: the vectors [count, H, D] float32 of the first `count` tokens of blocks [n].
Load = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Made:
    """Attention over keys that are made of values: with what `behind` loads behind them, or tied to them by `tie`, as
    the operator takes it. `heads` of `value_dim` numbers each, in blocks of `block_size` tokens."""

    values: Load
    behind: Load | None
    tie: Sequence[Tensor]
    heads: int
    value_dim: int
    block_size: int

    def attend(
        self,
        q: Tensor,
        own: Sequence[Tensor],
        tables: Tensor,
        starts: Tensor,
        lengths: Tensor,
        scale: float,
        window: int,
    ) -> tuple[Tensor, Tensor]:
        """As the operator `attend_made`."""
        out, lse = torch.zeros(*q.shape[:2], self.value_dim), torch.full(q.shape[:2], -torch.inf)
        whole = self.block_size if own else None
        for sequence, rows, length in sequences(starts, lengths):

            def load(start: int, count: int, sequence: int = sequence) -> tuple[Tensor, Tensor]:
                # What is not there is not seen.
                blocks = tables[sequence, start // self.block_size :][: -(-count // self.block_size)].clamp(min=0)
                return self._keys_and_values(blocks, count, start, sequence)

            attention = Rows(self.heads, length, scale, load, whole, window=window, value_dim=self.value_dim)
            out[rows], lse[rows] = attention.attend(q[rows].float())
        if not own:
            return out, lse
        used, centre = int(starts[-1]), torch.zeros(self.heads, q.shape[2])
        parts = out[:used], lse[:used], own[0][:used], own[1][:used]
        out[:used] = merge(q[:used].float(), *parts, centre, scale)
        return out, torch.logaddexp2(lse, own[1])

    def _keys_and_values(self, blocks: Tensor, count: int, start: int, sequence: int) -> tuple[Tensor, Tensor]:
        values = self.values(blocks, count)
        if self.behind is not None:
            return torch.cat((values, self.behind(blocks, count)), dim=-1), values
        weight, cos, sin, offsets = self.tie
        positions = int(offsets[sequence]) + start + torch.arange(count)
        return tied_keys(values, positions, weight, cos, sin), values


def tied_keys(values: Tensor, positions: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The keys [n, H, D] float32 that `values` at `positions` [n] int64 also are; the rest as `attend_made` has it."""
    turn, lean = (table[positions // 16, :, positions % 16][:, None] for table in (cos, sin))
    pairs, half = turn.shape[-1], values.shape[-1] // 2
    first, plain, second, rest = (values * weight).split((pairs, half - pairs) * 2, dim=-1)
    return torch.cat((first * turn - second * lean, plain, second * turn + first * lean, rest), dim=-1)


def attend_made(
    q: Tensor,
    own: list[Tensor],
    behind_planes: list[Tensor],
    behind_coding: list[int],
    behind_frame: list[Tensor],
    value_planes: list[Tensor],
    value_coding: list[int],
    value_frame: list[Tensor],
    tie: list[Tensor],
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over keys that are made of the values; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    size, heads, dim = check_stream(value_planes, value_coding, value_frame, keys=False)
    blocks, key_dim = len(value_planes[0]), dim
    if bool(behind_planes) == bool(tie):
        raise ValueError("keys have something behind the values, or are tied")
    if behind_planes:
        found = check_stream(behind_planes, behind_coding, behind_frame, keys=True)
        if found[:2] != (size, heads):
            raise ValueError("the planes behind and the value planes hold different blocks or heads")
        blocks, key_dim = min(blocks, len(behind_planes[0])), dim + found[2]
    if block_size != size:
        raise ValueError(f"block_size is {block_size}, but the planes hold blocks of {size}")
    if own and (len(own) != 2 or own[0].shape != (*q.shape[:2], dim) or own[1].shape != q.shape[:2]):
        raise ValueError(f"own and its lse are float32 {[*q.shape[:2], dim]} and {list(q.shape[:2])}")
    geometry = Geometry(blocks, heads, size, dim, torch.float32)
    check_attend(geometry, key_dim, q, tables, starts, lengths, scale, window, 0.0)
    if tie:
        _check_tie(tie, dim, lengths)

    def values(blocks: Tensor, count: int) -> Tensor:
        return _whole(value_planes, value_coding, value_frame, False, blocks, count)

    def behind(blocks: Tensor, count: int) -> Tensor:
        return _whole(behind_planes, behind_coding, behind_frame, True, blocks, count)

    made = Made(values, behind if behind_planes else None, tie, heads, dim, block_size)
    return made.attend(q, own, tables, starts, lengths, scale, window)


def _whole(
    planes: list[Tensor], flat: list[int], frame: list[Tensor], keys: bool, blocks: Tensor, count: int
) -> Tensor:
    """As `decode_blocks`, with the mean that codes have lost."""
    found = decode_blocks(planes, flat, frame, keys, blocks, count)
    return found + frame[0] if flat else found


def _check_tie(tie: Sequence[Tensor], dim: int, lengths: Tensor) -> None:
    if len(tie) != 4:
        raise ValueError(f"tied keys need weight, cos, sin and offsets, got {len(tie)} tensors")
    weight, cos, sin, offsets = tie
    if any(x.dtype != torch.float32 for x in (weight, cos, sin)) or weight.shape != (dim,):
        raise ValueError(f"weight must be float32 [{dim}], and cos and sin float32, got {list(weight.shape)}")
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[2] != 16 or 2 * cos.shape[1] > dim:
        raise ValueError(f"cos and sin must be [positions / 16, pairs, 16], got {list(cos.shape)}, {list(sin.shape)}")
    if offsets.shape != lengths.shape or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be {list(lengths.shape)} int32, got {list(offsets.shape)} {offsets.dtype}")
    ends = offsets + (lengths + 15) // 16 * 16
    if bool((offsets < 0).any()) or bool((offsets % 16 != 0).any()) or bool((ends > 16 * len(cos)).any()):
        raise ValueError(f"offsets are multiples of 16, and cos and sin have {16 * len(cos)} positions")


LIBRARIES[REFERENCE].impl("attend_made", attend_made, "CompositeExplicitAutograd")
