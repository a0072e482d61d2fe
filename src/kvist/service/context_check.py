"""Whether the KV of a context is what its tokens give: some of its blocks are computed again, and must be alike to the
bit.

A block is computed over the blocks before it as they are claimed to be, so it is right as far as these are: all blocks
are right where all are alike, and of a sample only those in it were looked at. Whoever knows how a sample is drawn
cannot know which blocks it holds: they are drawn from the system's randomness, anew each time."""

import secrets
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

from kvist.base.errors import KvistError
from kvist.cache.tier import Buffer
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.service.loaded import Loaded

LEAST, SHARE = 8, 16  # blocks of a sample: so many, or one of so many


class Check(StrEnum):
    """How an imported context is looked at."""

    SAMPLE = "sample"  # some blocks
    ALL = "all"
    TRUST = "trust"  # none: whoever made it is trusted


def drawn(count: int, check: Check) -> set[int]:
    """The numbers of the blocks, of `count`, that are computed again."""
    most = {Check.SAMPLE: max(LEAST, -(-count // SHARE)), Check.ALL: count, Check.TRUST: 0}[check]
    return set(secrets.SystemRandom().sample(range(count), min(most, count)))


def check_blocks(
    loaded: Loaded,
    tokens: Sequence[int],
    payloads: Iterable[Buffer],
    chosen: set[int],
    watch: Callable[[int], None] = lambda done: None,
) -> None:
    """Compute the `chosen` blocks of `tokens` again. `payloads`: of the whole blocks, in order, as far as they are
    needed. Raises `KvistError` for the first one that is another."""
    if not chosen:
        return
    size, last = loaded.layout.block_size, max(chosen)
    runner = Runner(loaded.model, loaded.layout, last + 1, loaded.backend, sequences=1)
    manager, most = runner.manager, min(runner.widths.most, size)
    lease = manager.open()
    for index, payload in enumerate(payloads):
        watch(index)
        start = index * size
        if index not in chosen:
            manager.reserve(lease, size)
            runner.store.write_block(manager.blocks_at(lease, index), payload)
            manager.commit(lease, size)
            continue
        for first in range(start, start + size, most):
            runner.run([Work(lease, list(tokens[first : min(first + most, start + size)]), 0)])
        if runner.store.read_block(manager.blocks_at(lease, index)) != payload:
            raise KvistError(
                f"block {index + 1}: its keys and values are not those that its tokens give here; whoever made it has "
                "another model, or means harm"
            )
        if index == last:
            return
