"""Streams of codecs that have no kernel: coded and decoded by the codec itself, in PyTorch, block by block.

Slow and obvious: what a new codec runs on until it is worth more. Always whole blocks, one at a time, so that a
block's bits never depend on what else is coded or decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.layout import StreamLayout
from kvist.cache.spec import Role
from kvist.ops import packing
from kvist.ops.attention import Rows
from kvist.ops.reference import merge, sequences


def seal_decoded(
    open: Tensor, planes: Sequence[Tensor], stream: StreamLayout, sources: Tensor, targets: Tensor
) -> None:
    """As the operator `seal`: code blocks `sources` [N] of the plane `open` into blocks `targets` [N] of `planes`."""
    gather = packing.gather_keys if stream.stream.role is Role.KEYS else packing.gather_values
    block_size, _, _ = packing.plane_geometry(open, stream.stream.role is Role.KEYS)
    for source, target in zip(sources, targets.tolist(), strict=True):
        x = gather(open, source[None], block_size)
        for plane, coded in zip(planes, stream.codec.encode(x, stream.stream, stream.frame), strict=True):
            plane[target] = coded


@dataclass(frozen=True)
class Sequences:
    """`tables`, `starts`, `lengths`, `window` as the operators take them, over blocks of `block_size` tokens."""

    tables: Tensor
    starts: Tensor
    lengths: Tensor
    block_size: int
    window: int = 0


def attend_decoded(
    q: Tensor,
    own: Tensor,
    lse: Tensor,
    keys: tuple[StreamLayout, Sequence[Tensor]],
    values: tuple[StreamLayout, Sequence[Tensor]],
    where: Sequences,
    scale: float,
    softcap: float,
) -> Tensor:
    """As the operator `attend_coded`, over whatever the codecs decode to. A stream comes with its planes."""
    out, size = torch.zeros_like(q), where.block_size
    for sequence, rows, length in sequences(where.starts, where.lengths):

        def load(start: int, count: int, table: Tensor = where.tables[sequence]) -> tuple[Tensor, Tensor]:
            found = table[start // size :][: -(-count // size)]
            blocks = found.clamp(min=0).tolist()  # what is gone is not seen
            k, v = (torch.cat([decode_block(*stream, block) for block in blocks]) for stream in (keys, values))
            return k[:count], v[:count]

        layout, _ = keys
        attention = Rows(layout.stream.heads, length, scale, load, size, window=where.window, softcap=softcap)
        result = attention.attend(q[rows].float())
        out[rows] = merge(q[rows].float(), *result, own[rows], lse[rows], layout.frame.mean, scale).to(q.dtype)
    return out


def decode_block(stream: StreamLayout, planes: Sequence[Tensor], block: int) -> Tensor:
    """One block [B, heads, dim] float32."""
    return stream.codec.decode(tuple(plane[block] for plane in planes), stream.stream, stream.frame)
