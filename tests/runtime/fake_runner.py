"""What the engine knows of a runner and of a kept cache, over lists instead of tensors, and without a model.

Each written position stores a digest of the digest before it, as it is *read back from the blocks*, and of its token;
the logits are made of that digest. Where layers have windows the digest is also of what these hold, each in blocks of
its own. Sealing is imitated as in `tests/cache/test_open_leases.py`."""

from collections.abc import Sequence as Tokens
from types import SimpleNamespace

import torch
from torch import Tensor

from kvist.base.errors import NumericsError
from kvist.base.events import CacheEvent
from kvist.cache.kept import Fetch, Fetched, KeptCounters, Losses
from kvist.cache.layout import Layout
from kvist.cache.manager import CacheManager, Lease
from kvist.cache.pool import BlockPool
from kvist.cache.record import BlockId
from kvist.cache.spec import Window
from kvist.cache.windows import WindowGroup
from kvist.runtime.batch import Work
from kvist.runtime.request import Request
from kvist.runtime.sampler import sample

SIZE = 4
BLOCKS = 12
RUNNING = 4
STEP = 11  # tokens
VOCAB = 8
BAD = VOCAB  # a token whose numbers are not finite
Cells = list[int | None]


def digest(before: int, token: int, seen: Tokens[Tokens[int | None]] = ()) -> int:
    """`seen`: what the digests before it are, through each window."""
    return hash((before, token, 17, *map(tuple, seen)))


def logits_of(digest: int) -> Tensor:
    return torch.tensor([(digest >> (5 * place)) % 7 for place in range(VOCAB)] + [-50], dtype=torch.float32)


class FakeRunner:
    """What the engine knows of a runner, over lists instead of tensors.

    `tight`: every pool has just the blocks that one sequence of so many tokens needs; as many may run as ever."""

    def __init__(
        self, manager: type[CacheManager], lossy: bool, windows: Tokens[int], tight: int | None = None
    ) -> None:
        self.events: list[CacheEvent] = []
        # Two at a time leave the tree more than the windows hold.
        self.sequences = 2 if windows and not tight else RUNNING
        facts = SimpleNamespace(block_size=SIZE, windows=[Window(size) for size in windows])
        counts = Layout.window_blocks(facts, self.sequences, STEP)  # type: ignore[arg-type]
        blocks, opened = BLOCKS, 2 * RUNNING + 3
        if tight:
            groups = [WindowGroup(window, BlockPool(1), SIZE, place) for place, window in enumerate(facts.windows)]
            counts = [group.most_blocks(tight) for group in groups]
            blocks, opened = -(-tight // SIZE), min(2, -(-tight // SIZE))
        open_pool = BlockPool(opened) if lossy else None
        pools = [(window, BlockPool(count)) for window, count in zip(facts.windows, counts, strict=True)]
        self.manager = manager(BlockPool(blocks), SIZE, self.events.append, open_pool, windows=pools)
        self.manager.make_public([place * place % 3 for place in range(2 * SIZE + 1)])
        self.widths = SimpleNamespace(most=64)
        self.model = SimpleNamespace(
            config=SimpleNamespace(max_positions=BLOCKS * SIZE, vocab_size=VOCAB + 1, hidden_size=1),
            adapters=SimpleNamespace(ids=["tuned"]),
        )
        # By group: of the layers that keep everything, then of those with windows.
        self.blocks = [[[None] * SIZE for _ in range(count)] for count in (blocks, *counts)]
        self.open: list[Cells] = [[None] * SIZE for _ in range(open_pool.capacity if open_pool else 0)]
        self.widest = 0
        self.store = self
        self.layout = SimpleNamespace(block_bytes=SIZE)

    def read_block(self, blocks: Tokens[int]) -> list[Cells]:
        return [memory[block].copy() for memory, block in zip(self.blocks, blocks, strict=True)]

    def write_block(self, blocks: Tokens[int], data: list[Cells]) -> None:
        for memory, block, cells in zip(self.blocks, blocks, data, strict=True):
            assert None not in cells
            memory[block] = cells.copy()

    def run(self, works: Tokens[Work]) -> list[Tensor]:
        self.widest = max(self.widest, sum(len(work.tokens) for work in works))
        reserved: list[Lease] = []
        try:
            for work in works:
                copies = self.manager.reserve(work.lease, len(work.tokens))
                reserved.append(work.lease)
                for copy in copies:
                    memory = self.open if copy.open else self.blocks[0 if copy.window is None else copy.window + 1]
                    memory[copy.target] = memory[copy.source].copy()
            if any(BAD in work.tokens for work in works):
                raise NumericsError("not finite")
        except BaseException:
            for lease in reserved:
                self.manager.rollback(lease, lease.length)
            raise
        rows = [self._write(work.lease, work.tokens, len(work.adapter)) for work in works]
        for work in works:
            self.manager.commit(work.lease, len(work.tokens))
        return [
            torch.stack([logits_of(d) for d in row])[len(row) - w.logits :] for row, w in zip(rows, works, strict=True)
        ]

    def _write(self, lease: Lease, tokens: Tokens[int], start: int) -> list[int]:
        passing: dict[int, Cells] = {}
        found = []
        for place, token in enumerate(tokens, lease.length):
            index, offset = divmod(place, SIZE)
            before = start if place == 0 else self._read(lease, place - 1, passing)
            assert before is not None, "a position that nobody has written"
            seen = [
                [
                    self._read(lease, earlier, passing, group)
                    for earlier in range(max(0, place - window.size + 1), place)
                ]
                for group, window in enumerate((of.window for of in self.manager.windows), start=1)
            ]
            value = digest(before, token, seen)
            if self.manager.open_pool is None:
                for memory, block in zip(self.blocks, self.manager.blocks_at(lease, index), strict=True):
                    memory[block][offset] = value
            else:
                cells = (
                    self.open[lease.open[index]] if index in lease.open else passing.setdefault(index, [None] * SIZE)
                )
                cells[offset] = value
                if offset == SIZE - 1:
                    for memory, block in zip(self.blocks, self.manager.blocks_at(lease, index), strict=True):
                        memory[block] = cells.copy()
            found.append(value)
        return found

    def _read(self, lease: Lease, place: int, passing: dict[int, Cells], group: int = 0) -> int | None:
        index, offset = divmod(place, SIZE)
        if index in lease.open:
            return self.open[lease.open[index]][offset]
        if index in passing:
            return passing[index][offset]
        block = self.manager.blocks_at(lease, index)[group]
        assert block >= 0, "a block that is still seen is gone"
        return self.blocks[group][block][offset]


class FakeKept:
    """What the keeper knows of a kept cache. Nothing is written or read but by `write` and `read`."""

    def __init__(self) -> None:
        self.tiers = ("fake",)
        self.rivals = ()
        self.losses = Losses(KeptCounters())
        self.records: dict[str, list[Cells]] = {}
        self.queue: dict[str, list[Cells]] = {}
        self.fetches: list[Fetch] = []
        self.room = 3
        self.hits = 0

    @property
    def has_room(self) -> bool:
        return len(self.queue) < self.room

    def has(self, block: BlockId) -> bool:
        return block.name in self.records

    def is_kept(self, block: BlockId) -> bool:
        return block.name in self.records or block.name in self.queue

    def save(self, block: BlockId, payload: list[Cells], until: float) -> None:
        self.queue[block.name] = payload

    def pin(self, blocks: Tokens[str], until: float) -> None:
        pass

    def fetch(self, blocks: Tokens[BlockId], start: int) -> Fetch:
        self.fetches.append(Fetch(blocks, start))
        return self.fetches[-1]

    def take(self, fetch: Fetch) -> Fetched:
        fetch.taken += 1
        return fetch.ready.popleft()

    def cancel(self, fetch: Fetch) -> None:
        fetch.cancelled = True
        fetch.ready.clear()

    def wait(self, fetches: Tokens[Fetch], seconds: float) -> None:
        self.read(1)

    def write(self, count: int) -> None:
        for name in list(self.queue)[:count]:
            self.records[name] = self.queue.pop(name)

    def read(self, count: int) -> None:
        self.fetches = [fetch for fetch in self.fetches if not fetch.done and not fetch.cancelled]
        for fetch in self.fetches:
            for block in fetch.blocks[fetch.read : fetch.read + count]:
                fetch.read += 1
                fetch.done = fetch.read == len(fetch.blocks)
                if block.name not in self.records:
                    fetch.done = True
                    break
                self.hits += 1
                fetch.ready.append(Fetched(block, self.records[block.name].copy(), "fake"))  # type: ignore[arg-type]


def alone(request: Request, windows: Tokens[int]) -> list[int]:
    """What a request draws, from nothing."""
    tokens, values = list(request.prompt), list[int]()

    def go_on(token: int) -> None:
        before = values[-1] if values else len(request.adapter)
        values.append(digest(before, token, [values[max(0, len(values) - size + 1) :] for size in windows]))

    for token in tokens:
        go_on(token)
    while len(tokens) - len(request.prompt) < request.max_tokens and len(tokens) <= BLOCKS * SIZE:
        token = sample(logits_of(values[-1]), request.sampling, len(tokens))
        tokens.append(token)
        go_on(token)
        if token in request.stop_ids:
            break
    return tokens[len(request.prompt) :]
