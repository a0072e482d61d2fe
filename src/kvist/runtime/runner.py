"""Carries out one step: reserve, run, commit. Owns the store and the only path by which it is written."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.base.errors import ConfigError, NumericsError
from kvist.base.events import Listener
from kvist.cache.layout import OPEN_BLOCKS, Layout
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.store import Store
from kvist.cache.view import PagedViews
from kvist.models.decoder import Decoder
from kvist.ops.backend import Backend
from kvist.runtime.batch import Batch, Work, build_batch, pad_rows
from kvist.runtime.widths import HEAD_LADDER, probe, widths_folder

SEQUENCES = 8


class Runner:
    """A model and its cache of `blocks` blocks, for at most `sequences` sequences at once.

    Where codecs are lossy each of these keeps a block or two in full precision, and the prefix tree `tails` more: the
    last blocks of sequences that ended, so that whoever goes on from there computes nothing again. `identity`: what of
    this model's KV has to be equal for it to be the same, where it is kept outside of memory. `windows`: blocks of each
    group of layers with a window; by default what so many sequences need, and nothing for prefixes."""

    def __init__(
        self,
        model: Decoder,
        layout: Layout,
        blocks: int,
        backend: Backend,
        listener: Listener | None = None,
        sequences: int = SEQUENCES,
        tails: int = 0,
        identity: bytes = b"",
        windows: Sequence[int] | None = None,
    ) -> None:
        if any(window.sinks for window in layout.windows):
            raise ConfigError("windows with sinks have no kernel")
        self.model = model
        self.layout = layout
        self.backend = backend
        self.widths = probe(model.linears(), folder=widths_folder())
        self.head_widths = probe(model.head_products(), HEAD_LADDER, widths_folder())
        model.pad_rows(self.widths.fit)
        self.sequences = sequences
        open_pool = BlockPool(OPEN_BLOCKS * sequences + tails) if layout.open_bytes else None
        pool = BlockPool(blocks)
        counts = layout.window_blocks(sequences, self.widths.most) if windows is None else windows
        pools = [(window, BlockPool(count)) for window, count in zip(layout.windows, counts, strict=True)]
        self.manager = CacheManager(pool, layout.block_size, listener, open_pool, tails > 0, identity, pools)
        # A step fills no more blocks whole than this; other blocks that it writes are open ones of a lease.
        self.passing = self.widths.most // layout.block_size if open_pool else None
        self.store = Store(layout, blocks, open_pool.capacity if open_pool else 0, self.passing or 0, counts)

    def run(self, works: Sequence[Work]) -> list[Tensor]:
        """One step. Returns each work's logits `[work.logits, vocab_size]` float32 and commits its tokens.

        At most `widths.most` tokens in all. Raises `OutOfBlocks` or `NumericsError`; whatever is raised, every
        lease holds the tokens that it held before the call.
        """
        reserved: list[Lease] = []
        try:
            for work in works:
                copies = self.manager.reserve(work.lease, len(work.tokens))
                reserved.append(work.lease)
                # Copied at once: a lease never holds a fresh block without the tokens it stands for.
                self.store.copy(copies)
            batch = build_batch(works, self.layout.block_size, self.widths, self.passing, len(self.layout.windows))
            if self.model.adapters is not None:
                self.model.adapters.assign([work.adapter for work in works for _ in work.tokens])
            hidden, logits = self._forward(batch)
        except BaseException:
            for lease in reserved:
                self.manager.rollback(lease, lease.length)
            raise
        for work, rows in zip(works, hidden.split([len(work.tokens) for work in works]), strict=True):
            self.manager.commit(work.lease, len(work.tokens))
            if work.pool is not None:
                for row in rows.double():
                    work.pool.add_(row)
        return list(logits.split([work.logits for work in works]))

    @torch.inference_mode()
    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The last hidden states `[tokens, hidden_size]`, and the wanted logits, finite, `[rows, vocab_size]`
        float32."""
        views = PagedViews(self.store, batch.step, self.backend)
        hidden = self.model(batch.tokens, batch.positions, views)
        most = self.head_widths.most
        parts = []
        for start in range(0, len(batch.logit_rows), most):
            rows = batch.logit_rows[start : start + most]
            parts.append(self.model.logits(hidden[pad_rows(rows, self.head_widths)])[: len(rows)])
        if not parts:
            return hidden[: batch.rows], torch.empty(0, self.model.config.vocab_size)
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not all(map(math.isfinite, logits.aminmax())):
            raise NumericsError(
                "the model's logits are not finite numbers: its weights are damaged, or overflow in this dtype "
                "(try --dtype fp32)"
            )
        return hidden[: batch.rows], logits
