"""Where the rows of one step live in the store. Made by the batch, read by every layer."""

from dataclasses import dataclass

from torch import Tensor

from kvist.ops.reference_made import tied_keys


@dataclass(frozen=True)
class Tie:
    """How keys are made of the values of tied streams: times `weight` `[dim]`, then dimension i < pairs rotated with
    i + dim / 2 by `cos` and `sin` `[positions / 16, pairs, 16]`. All float32, contiguous."""

    weight: Tensor
    cos: Tensor
    sin: Tensor

    def keys(self, values: Tensor, positions: Tensor) -> Tensor:
        """The keys that `values` `[n, heads, dim]` at `positions` `[n]` int64 also are."""
        return tied_keys(values, positions, self.weight, self.cos, self.sin)


@dataclass(frozen=True)
class OpenStep:
    """The blocks that one step writes, in full precision; ids as `OpenPlanes` counts them. Made by the batch.

    `slots` `[T]` int64: block * block_size + offset of each row, -1 for padding. `tables` `[N, 1]` int32: each block.
    `starts` `[N + 1]` int32: its first row. `lengths` `[N]` int32: its tokens once this step is written; `offsets`
    `[N]` int32: the position of the first. `sources` `[M]` int64: those that are then full; `targets` `[M]` int64, by
    group of layers: the blocks of its pool that they are coded into.
    """

    slots: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    sources: Tensor
    targets: list[Tensor]


@dataclass(frozen=True)
class Step:
    """Where the rows of one step live. Made by the batch, read by every layer.

    `slots` `[T]` int64, by group of layers: block * block_size + offset of each row, -1 for padding.
    `tables` `[S, blocks]` int32, by group: each sequence's block ids, -1 where one is gone. `starts` `[S + 1]` int32:
    its first row. `lengths` `[S]` int32: its tokens in the cache once this step is written. `open`: where codecs are
    lossy.
    """

    slots: list[Tensor]
    tables: list[Tensor]
    starts: Tensor
    lengths: Tensor
    open: OpenStep | None = None
