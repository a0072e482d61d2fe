"""All that a model sees of the cache: write this step's vectors, attend over everything before and including them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvist.cache.store import Store
from kvist.ops.backend import Backend


class LayerView(Protocol):
    """One layer's cache during one step of `T` rows, padding rows included."""

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `k`, `v`: `[T, kv_heads, head_dim]`, one row per token of the step."""
        ...

    def attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        """Softmax attention of `q` `[T, heads, head_dim]` over the tokens up to each row's own. Same shape out."""
        ...


@dataclass(frozen=True)
class Step:
    """Where the rows of one step live. Made by the batch, read by every layer.

    `slots` `[T]` int64: block * block_size + offset of each row, -1 for padding.
    `tables` `[S, blocks]` int32: each sequence's block ids. `starts` `[S + 1]` int32: its first row.
    `lengths` `[S]` int32: its tokens in the cache once this step is written.
    """

    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class PagedView:
    """A layer's view of the store: `keys` and `values` are its planes."""

    keys: torch.Tensor
    values: torch.Tensor
    step: Step
    backend: Backend

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.backend.write(self.keys, self.values, k, v, self.step.slots)

    def attend(self, q: torch.Tensor, scale: float) -> torch.Tensor:
        step = self.step
        return self.backend.attend(q, self.keys, self.values, step.tables, step.starts, step.lengths, scale)


def paged_views(store: Store, step: Step, backend: Backend) -> Sequence[LayerView]:
    """One view per layer of the model, in order."""
    views = []
    for layer in range(len(store.layout.layers)):
        keys, values = store.planes(layer)
        views.append(PagedView(keys, values, step, backend))
    return views
