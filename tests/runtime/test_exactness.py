"""However a sequence comes to be computed, its logits have the same bits: `torch.equal`, no tolerance.

The standard is a run from nothing in the widest steps. Lengths cross the ends of blocks (64) and of the attention's
splits (512). Before each test the whole store is poisoned with NaN, so a token read that was never written shows.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvist.base.events import CacheEvent, Reserved
from kvist.cache.manager import Lease
from kvist.cache.spec import SLACK
from kvist.models.config import ModelConfig
from kvist.runtime import runner as runner_module
from kvist.runtime.batch import Batch, Work
from kvist.runtime.runner import Runner
from oracle import GPT2, LLAMA, QWEN3, cuts, feed, fresh, make_runner, tokens_of

LENGTH = 530
WINDOWS = replace(LLAMA, windows=(70, 0))
ALL_WINDOWS = replace(QWEN3, windows=(70, 70))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}
KINDS = [
    pytest.param((config, dtype, kv), id=f"{config.family}-{dtype}-kv-{kv}{'-windows' if config.windows else ''}")
    for config, dtype, kv in [
        (LLAMA, "fp32", "fp32"),
        (LLAMA, "bf16", "bf16"),
        (LLAMA, "fp32", "bf16"),
        (LLAMA, "bf16", "fp16"),
        (QWEN3, "fp32", "fp16"),
        (QWEN3, "bf16", "fp32"),
        (GPT2, "fp32", "fp32"),
        (GPT2, "fp16", "bf16"),
        (QWEN3, "fp32", "turbo4"),
        (QWEN3, "bf16", "turbo2.5"),
        (QWEN3, "fp32", "k=int8,v=turbo3"),
        (QWEN3, "bf16", "k=bf16,v=int4"),
        (QWEN3, "fp16", "turbo2,0:fp16"),
        (WINDOWS, "fp32", "bf16"),
        (WINDOWS, "bf16", "fp32"),
        (ALL_WINDOWS, "fp32", "turbo4"),
        (ALL_WINDOWS, "int8", "k=int8,v=turbo3"),
        (LLAMA, "int8", "fp32"),
        (QWEN3, "int8", "turbo4"),
        (QWEN3, "int4", "turbo2,0:fp16"),
        (GPT2, "int4", "bf16"),
    ]
]


def poison(runner: Runner) -> None:
    """NaN in every number of every block, scales and open blocks included; codes are whatever they are."""
    planes = [plane for layer in range(runner.model.config.layers) for plane in runner.store.planes(layer)]
    planes += [plane for open in runner.store.open_planes for plane in (open.keys, open.values)]
    for plane in planes:
        plane.fill_(torch.nan if plane.dtype.is_floating_point else 0xA5)


@pytest.fixture(params=KINDS)
def runner(request: pytest.FixtureRequest, backend_name: str) -> Runner:
    config, dtype, kv = request.param
    made = make_runner(
        config, DTYPES.get(dtype, torch.float32), kv, blocks=48, backend=backend_name, bits=BITS.get(dtype)
    )
    poison(made)
    return made


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)


def same_bits(ours: Tensor, expected: Tensor) -> bool:
    assert bool(torch.isfinite(expected).all())
    return torch.equal(ours, expected)


def cut(runner: Runner, lease: Lease, length: int) -> int:
    """Roll back to `length`; returns where the lease then ends: before the block that is cut, if that is coded; at 0,
    if a window before it is gone."""
    lossy, before = runner.layout.open_bytes > 0, lease.length
    runner.manager.rollback(lease, length)
    ends = {length, length // 64 * 64} if lossy else {length}
    if runner.layout.windows and length < before - SLACK:
        ends.add(0)
    assert lease.length in ends
    return lease.length


def test_every_way_of_computing_gives_the_same_bits(runner: Runner, rng: random.Random) -> None:
    """One run from nothing; then chunked, one by one, beside others, rolled back and forked, all in dirty blocks."""
    tokens = tokens_of(rng, LENGTH)
    expected = fresh(runner, tokens)
    assert torch.unique(expected, dim=0).shape[0] == LENGTH, "rows that are all alike would prove nothing"
    manager = runner.manager

    lease = manager.open()
    assert same_bits(feed(runner, lease, tokens, cuts(rng, LENGTH, 150)), expected)
    assert len(lease.table) == 9

    # One by one across the end of a block, and across the end of a split.
    start = cut(runner, lease, 60)
    sizes = [60 - start, *[1] * 8, 438, *[1] * 10, 14]
    assert same_bits(feed(runner, lease, tokens[start:], filter(None, sizes)), expected[start:])

    # Wrong tokens written and taken back, in the middle of a block.
    for kept in (0, rng.randint(1, 63), rng.randint(65, 511), 513):
        start = cut(runner, lease, kept)
        feed(runner, lease, tokens_of(rng, rng.randint(1, 100)))
        assert cut(runner, lease, start) == start
        assert same_bits(feed(runner, lease, tokens[start:]), expected[start:])

    # A twin that goes another way from the middle of a block, while the first one waits.
    twin, shared = manager.fork(lease), rng.randint(300, LENGTH - 1)
    shared = cut(runner, twin, shared)
    other = tokens[:shared] + tokens_of(rng, LENGTH - shared)
    theirs = feed(runner, twin, other[shared:], cuts(rng, LENGTH - shared, 40))
    cut(runner, lease, shared)
    assert same_bits(feed(runner, lease, tokens[shared:], cuts(rng, LENGTH - shared, 40)), expected[shared:])
    assert same_bits(theirs, fresh(runner, other)[shared:])
    manager.release(twin)
    manager.release(lease)

    beside_others(runner, tokens, expected, rng)
    manager.check()
    assert manager.pool.used == 0


def beside_others(runner: Runner, tokens: list[int], expected: Tensor, rng: random.Random) -> None:
    """The sequence grows in random strides at a random place of batches of up to five."""
    texts = [tokens] + [tokens_of(rng, rng.randint(1, LENGTH)) for _ in range(4)]
    leases = [runner.manager.open() for _ in texts]
    parts, most_beside = [], 0
    while leases[0].length < LENGTH:
        works = []
        for text, lease in zip(texts, leases, strict=True):
            stride = rng.choice((1, 9, runner.widths.most // 5))
            if part := text[lease.length : lease.length + stride]:
                works.append(Work(lease, part, len(part)))
        rng.shuffle(works)
        logits = dict(zip([work.lease.id for work in works], runner.run(works), strict=True))
        parts.append(logits[leases[0].id])
        most_beside = max(most_beside, len(works))
    assert most_beside == 5
    assert same_bits(torch.cat(parts), expected)
    for lease in leases:
        runner.manager.release(lease)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, rng: random.Random) -> None:
    runner = make_runner(QWEN3, torch.bfloat16, "bf16")
    tokens = tokens_of(rng, 140)
    expected = fresh(runner, tokens)
    torch.set_num_threads(threads)
    lease = runner.manager.open()
    assert same_bits(feed(runner, lease, tokens, [100, 1, 1, 38]), expected)


def test_a_fork_did_copy_and_widths_did_vary(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rely on was in use: blocks copied on write, and steps padded to several widths."""
    events: list[CacheEvent] = []
    runner = make_runner(listener=events.append)
    rows: set[tuple[int, int]] = set()
    build_batch = runner_module.build_batch

    def watched(works: list[Work], *rest: Any) -> Batch:
        batch = build_batch(works, *rest)
        rows.add((sum(len(work.tokens) for work in works), len(batch.tokens)))
        return batch

    monkeypatch.setattr(runner_module, "build_batch", watched)
    tokens = tokens_of(rng, 100)
    lease = runner.manager.open()
    feed(runner, lease, tokens, [70, 1, 5, 24])
    twin = runner.manager.fork(lease)
    feed(runner, twin, tokens_of(rng, 3))
    assert [event.copies for event in events if isinstance(event, Reserved)] == [0, 0, 0, 0, 1]
    assert rows == {(70, 96), (1, 4), (5, 8), (24, 24), (3, 4)}


Damage = Callable[[Runner, pytest.MonkeyPatch], None]


def skips_a_write(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runner.backend.write

    def skipping(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        write(keys, values, k, v, torch.where(slots % 64 == 17, -1, slots))

    monkeypatch.setattr(runner, "backend", replace(runner.backend, write=skipping))


def writes_one_token_too_far(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    write = runner.backend.write

    def shifted(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        write(keys, values, k, v, torch.where((slots >= 0) & (slots % 64 == 17), slots + 1, slots))

    monkeypatch.setattr(runner, "backend", replace(runner.backend, write=shifted))


def reads_another_block(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = runner.backend.attend

    def stale(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, *rest: object) -> Tensor:
        return attend(q, keys, values, tables.flip(1) if tables.shape[1] > 1 else tables, starts, *rest)

    monkeypatch.setattr(runner, "backend", replace(runner.backend, attend=stale))


def counts_positions_from_one(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only after the first chunk, as a wrong length of a lease would."""
    build_batch = runner_module.build_batch

    def late(works: list[Work], *rest: Any) -> Batch:
        batch = build_batch(works, *rest)
        return replace(batch, positions=batch.positions + (batch.positions > 0) * (works[0].lease.length > 0))

    monkeypatch.setattr(runner_module, "build_batch", late)


def forgets_to_copy(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.store, "copy", lambda copies: None)


@pytest.mark.parametrize(
    "damage",
    [skips_a_write, writes_one_token_too_far, reads_another_block, counts_positions_from_one, forgets_to_copy],
)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_comparison_notices_a_broken_cache(
    damage: Damage, config: ModelConfig, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and a fork over a broken cache, against a whole one. Blocks hold old, finite numbers, as in use."""
    tokens = tokens_of(rng, 200)
    expected = fresh(make_runner(config), tokens)
    runner = make_runner(config)

    def chunked_and_forked() -> Tensor:
        lease = runner.manager.open()
        parts = [feed(runner, lease, tokens[:100], [90, 1, 9])]
        twin = runner.manager.fork(lease)
        runner.manager.release(lease)
        keeper = runner.manager.fork(twin)
        parts.append(feed(runner, twin, tokens[100:], [1, 50, 49]))
        runner.manager.release(keeper)
        runner.manager.release(twin)
        return torch.cat(parts)

    assert same_bits(chunked_and_forked(), expected)
    for filler in (13, 31):
        feed(runner, runner.manager.open(), [filler] * 64)
    for lease in list(runner.manager.leases):
        runner.manager.release(lease)
    damage(runner, monkeypatch)
    assert not same_bits(chunked_and_forked(), expected)
