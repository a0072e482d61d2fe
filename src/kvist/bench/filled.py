"""A cache that holds a long context without a model having computed it: what long contexts cost is then measured in
seconds. Keys and values come from a normal distribution and go through the same views as a model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.layout import OPEN_BLOCKS, Layout
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.store import Store
from kvist.cache.view import LayerView, PagedViews
from kvist.ops.backend import Backend
from kvist.runtime.batch import Work, build_batch
from kvist.runtime.runner import Runner
from kvist.runtime.widths import Widths

CHUNK = 512


@dataclass(frozen=True)
class FilledCache:
    """A store, its manager, and the number of its passing blocks where codecs are lossy."""

    store: Store
    manager: CacheManager
    passing: int | None
    backend: Backend
    chunk: int = CHUNK  # tokens that are written at once, at most

    @staticmethod
    def for_one(layout: Layout, tokens: int, backend: Backend) -> "FilledCache":
        """An empty cache that holds one sequence of `tokens` tokens."""
        blocks, opens = -(-tokens // layout.block_size), layout.open_bytes > 0
        passing = CHUNK // layout.block_size if opens else None
        open_pool = BlockPool(OPEN_BLOCKS) if opens else None
        manager = CacheManager(BlockPool(blocks), layout.block_size, open_pool=open_pool)
        store = Store(layout, blocks, OPEN_BLOCKS, passing or 0)
        return FilledCache(store, manager, passing, backend)

    @staticmethod
    def of(runner: Runner) -> "FilledCache":
        """The cache that a model runs on."""
        return FilledCache(runner.store, runner.manager, runner.passing, runner.backend, runner.widths.most)

    def append(self, lease: Lease, k: Tensor | None, v: Tensor) -> None:
        """Commit tokens `k`, `v` `[n, heads, dim]` to every layer, as `LayerView.write` takes them."""
        for start in range(0, len(v), self.chunk):
            part = slice(start, min(start + self.chunk, len(v)))
            for view in self.step(lease, part.stop - part.start):
                view.write(None if k is None else k[part], v[part])
            self.manager.commit(lease, part.stop - part.start)

    def append_random(self, lease: Lease, tokens: int) -> None:
        """Commit random tokens, the same in every layer."""
        streams = self.store.layout.layers[0].spec.streams
        generator, dtype = torch.Generator().manual_seed(lease.length), self.store.layout.full.dtype
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            k, v = (torch.randn(count, s.heads, s.dim, generator=generator).to(dtype) for s in streams)
            self.append(lease, k, v)

    def step(self, lease: Lease, tokens: int) -> Sequence[LayerView]:
        """The layers' views of a step of `tokens` more tokens, which are then reserved and not yet committed."""
        self.manager.reserve(lease, tokens)
        windows = len(self.manager.windows)
        work, size = [Work(lease, [0] * tokens)], self.manager.block_size
        batch = build_batch(work, size, Widths((tokens,)), self.passing, windows)
        return PagedViews(self.store, batch.step, self.backend)
