"""Blocks that come back from a folder: the same tokens and the same logits as computed, with proof that they did."""

import logging
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvist.cache.disk import DiskTier
from kvist.cache.kept import KeptCache
from kvist.cache.record import Loss
from kvist.models.config import ModelConfig
from kvist.models.families import read_config
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.sequence import Sequence
from oracle import LATENT, LLAMA, SHARED_AND_TIED, make_runner, tokens_of

TALL = replace(LLAMA, head_dim=32)
BUDGET = 1 << 30


class Kept:
    """An engine over a folder, whose logits are written down."""

    def __init__(
        self,
        folder: Path,
        kv: str = "fp32",
        blocks: int = 40,
        budget: int = BUDGET,
        identity: bytes = b"a",
        config: ModelConfig | None = None,
        windows: list[int] | None = None,
    ):
        base = make_runner(config or (LLAMA if kv == "fp32" else TALL), kv=kv)
        runner = Runner(
            base.model, base.layout, blocks, base.backend, sequences=4, tails=4, identity=identity, windows=windows
        )
        self.disk = DiskTier(folder, budget)
        self.kept = KeptCache([self.disk], base.layout.block_bytes)
        self.engine = Engine(runner, kept=self.kept)
        self.logits: list[Tensor] = []
        run = runner.run

        def noted(works):  # type: ignore[no-untyped-def]
            found = run(works)
            self.logits += [rows[-1].clone() for rows in found if len(rows)]
            return found

        runner.run = noted  # type: ignore[method-assign]

    def ask(self, prompt: list[int], new: int = 6, **more: object) -> Sequence:
        sequence = self.engine.add(Request(tuple(prompt), new, Sampling(temperature=1.0, seed=3), **more))  # type: ignore[arg-type]
        self.run()
        return sequence

    def run(self) -> None:
        while not self.engine.idle:
            self.engine.step()
            self.engine.check()

    def end(self) -> None:
        assert self.engine.keeper.flush(30)
        self.disk.check()
        self.kept.close()
        self.disk.close()


@pytest.mark.parametrize("windows", [(70, 0), (30, 100)])
@pytest.mark.parametrize("kv", ["fp32", "turbo4"])
def test_layers_with_windows_come_back_as_well(kv: str, windows: tuple[int, ...], tmp_path: Path) -> None:
    """From the folder, and in memory where the pools of windows hold no more than their ends."""
    config, prompt = replace(TALL, windows=windows), tokens_of(random.Random(1), 500)
    first = Kept(tmp_path, kv, config=config)
    cold = first.ask(prompt)
    other = first.ask(tokens_of(random.Random(2), 700))
    first.end()
    again = Kept(tmp_path, kv, config=config)
    warm = again.ask(prompt)
    assert warm.cached.tiers["disk"] >= 384
    assert warm.tokens == cold.tokens
    assert torch.equal(again.logits[-1], first.logits[5])
    assert again.ask(tokens_of(random.Random(2), 700)).tokens == other.tokens
    once_more = again.ask([*prompt, 5, 6, 7])
    assert sum(once_more.cached.tiers.values()) >= 384
    again.end()


@pytest.mark.parametrize("kv", ["fp32", "turbo4"])
@pytest.mark.parametrize("raw", [SHARED_AND_TIED, LATENT], ids=["shared and tied", "latent"])
def test_every_kind_of_layer_comes_back(raw: dict[str, object], kv: str, tmp_path: Path) -> None:
    config, prompt = read_config(raw, "test"), tokens_of(random.Random(1), 300)
    first = Kept(tmp_path, kv, config=config)
    cold = first.ask(prompt)
    first.end()
    again = Kept(tmp_path, kv, config=config)
    warm = again.ask(prompt)
    assert warm.cached.tiers["disk"] == 256
    assert warm.tokens == cold.tokens
    assert torch.equal(again.logits[-1], first.logits[-1])
    again.end()


@pytest.mark.parametrize("kv", ["fp32", "turbo4", "int8"])
def test_after_a_restart_a_prompt_is_read_and_goes_on_with_the_same_bits(kv: str, tmp_path: Path) -> None:
    prompt = tokens_of(random.Random(1), 500)
    first = Kept(tmp_path, kv)
    cold = first.ask(prompt)
    assert cold.cached.tiers == {"memory": 0}
    first.end()
    again = Kept(tmp_path, kv)
    warm = again.ask(prompt)
    assert warm.cached.tiers["disk"] == 448
    assert again.kept.counters.hits["disk"] == 7
    assert again.engine.counters.computed == 500 - 448 + 5
    assert warm.new_tokens == cold.new_tokens
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    again.end()


PROMPT = tokens_of(random.Random(1), 400)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence]:
    """A folder after one prompt, and the sequence that was drawn."""
    folder = tmp_path_factory.mktemp("kept") / "kv"
    first = Kept(folder)
    cold = first.ask(PROMPT)
    first.end()
    return folder, cold


def damage(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.randrange(6)
    path.unlink()
    if kind == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 1:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == 2:
        data[rng.randrange(200)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == 3:
        path.write_bytes(data + b"more")
    elif kind == 4:
        path.mkdir()


@pytest.mark.parametrize("seed", range(100))
def test_whatever_happened_to_the_files_the_tokens_are_those_of_a_cold_run(
    seed: int, left_behind: tuple[Path, Sequence], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, (folder, cold) = random.Random(seed), left_behind
    copy = Path(shutil.copytree(folder, tmp_path / "kv"))
    files = sorted(copy.rglob("*.kv"))
    victims = rng.sample(files, rng.randint(1, 3))
    for path in victims:
        damage(rng, path)
    again = Kept(copy)
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        warm = again.ask(PROMPT)
    assert warm.new_tokens == cold.new_tokens
    assert warm.cached.tiers["disk"] % 64 == 0
    assert warm.cached.tiers["disk"] < 384
    seen = sum(again.kept.counters.losses.values()) + sum(again.kept.counters.failures.values())
    gone = any(not path.exists() for path in victims)
    assert seen or gone or warm.loss is None
    assert bool(caplog.records) == bool(sum(again.kept.counters.losses.values()))
    # And it is mended: whoever comes next reads all of it.
    assert again.engine.keeper.flush(30)
    again.kept.close()
    for path in copy.rglob("*.kv"):
        if path.is_dir():
            path.rmdir()


def test_what_other_weights_made_is_not_found_and_told(left_behind: tuple[Path, Sequence], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(left_behind[0], tmp_path / "kv"))
    other = Kept(copy, identity=b"b")
    other.kept.rivals = (b"a",)
    asked = other.ask(PROMPT)
    assert asked.cached.tiers["disk"] == 0
    assert asked.loss is Loss.NAMESPACE
    assert other.kept.counters.losses["disk", Loss.NAMESPACE] == 1
    assert asked.new_tokens == left_behind[1].new_tokens
    other.end()
    back = Kept(copy)
    assert back.ask(PROMPT).cached.tiers["disk"] == 384
    back.end()


def test_nothing_of_another_tenant_is_found(left_behind: tuple[Path, Sequence], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(left_behind[0], tmp_path / "kv"))
    kept = Kept(copy)
    assert kept.ask(PROMPT, tenant="other").cached.tiers["disk"] == 0
    assert kept.ask(PROMPT).cached.tiers["disk"] == 384
    assert kept.ask(PROMPT, tenant="other").cached.tiers["memory"] >= 384
    kept.end()


class Gate:
    """Lets a disk read when it is opened."""

    def __init__(self, disk: DiskTier) -> None:
        self.event = threading.Event()
        self._get = disk.get
        disk.get = self.get  # type: ignore[method-assign]

    def get(self, block: str, size: int) -> object:
        assert self.event.wait(20)
        return self._get(block, size)


@pytest.mark.parametrize("seed", range(100))
def test_a_load_that_is_cancelled_gives_everything_back(
    seed: int, left_behind: tuple[Path, Sequence], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    kept = Kept(Path(shutil.copytree(left_behind[0], tmp_path / "kv")))
    gate = Gate(kept.disk)
    sequence = kept.engine.add(Request(tuple(PROMPT), 6, Sampling(temperature=1.0, seed=3)))
    kept.engine.step()
    assert sequence.fetch is not None
    if seed % 2:
        gate.event.set()
        for _ in range(rng.randrange(4)):
            kept.engine.step()
    kept.engine.finish(sequence, FinishReason.CANCELLED)
    gate.event.set()
    kept.engine.check()
    assert not list(kept.engine.runner.manager.leases)
    assert kept.ask(PROMPT).new_tokens == left_behind[1].new_tokens
    kept.end()


@pytest.mark.parametrize("seed", range(100))
def test_a_load_makes_room_for_what_is_urgent(seed: int, left_behind: tuple[Path, Sequence], tmp_path: Path) -> None:
    """Preempted in the middle, it comes back and draws the same tokens."""
    kept = Kept(Path(shutil.copytree(left_behind[0], tmp_path / "kv")), blocks=9)
    gate, other = Gate(kept.disk), tokens_of(random.Random(seed), 300)
    loading = kept.engine.add(Request(tuple(PROMPT), 6, Sampling(temperature=1.0, seed=3), priority=1))
    kept.engine.step()
    assert loading.fetch is not None
    urgent = kept.engine.add(Request(tuple(other), 6, Sampling(temperature=1.0, seed=seed)))
    for step in range(400):
        if step == 3 + seed % 12:
            gate.event.set()
        kept.engine.step()
        kept.engine.check()
        if kept.engine.idle:
            break
    assert loading.preempted == 1
    assert loading.new_tokens == left_behind[1].new_tokens
    assert urgent.finish_reason is FinishReason.LENGTH
    assert loading.cached.tiers["disk"] > 0
    kept.end()


def test_others_go_on_while_one_waits_for_the_disk(left_behind: tuple[Path, Sequence], tmp_path: Path) -> None:
    kept = Kept(Path(shutil.copytree(left_behind[0], tmp_path / "kv")))
    gate = Gate(kept.disk)
    loading = kept.engine.add(Request(tuple(PROMPT), 6, Sampling(temperature=1.0, seed=3)))
    other = kept.engine.add(Request(tuple(tokens_of(random.Random(8), 100)), 20))
    for _ in range(40):
        kept.engine.step()
    assert other.finish_reason is FinishReason.LENGTH
    assert loading.new_tokens == []
    gate.event.set()
    kept.run()
    assert loading.new_tokens == left_behind[1].new_tokens
    kept.end()


def test_a_disk_that_stalls_is_not_waited_for(
    left_behind: tuple[Path, Sequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvist.runtime.keeper.STALL", 0.2)
    kept = Kept(Path(shutil.copytree(left_behind[0], tmp_path / "kv")))
    gate = Gate(kept.disk)
    started = time.monotonic()
    found = kept.ask(PROMPT)
    assert 0.2 < time.monotonic() - started < 5
    assert found.new_tokens == left_behind[1].new_tokens
    assert found.loss is Loss.UNREADABLE
    gate.event.set()
    kept.end()


def test_what_is_asked_not_to_be_kept_is_not(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.ask(PROMPT, kept=False)
    assert kept.engine.keeper.flush(30)
    assert len(kept.disk) == 0
    kept.engine.runner.manager.tree.clear()
    assert kept.ask(PROMPT).loss is Loss.UNKEPT
    kept.end()


def test_evicted_before_it_was_written_is_written_then(tmp_path: Path) -> None:
    """A pool that is too small for two prompts, and writers that have no room until the first is evicted."""
    kept = Kept(tmp_path, blocks=8)
    writer = kept.kept._writers[0]
    writer._most = 0
    kept.ask(PROMPT)
    assert kept.engine.keeper.pending
    assert len(kept.disk) == 0
    writer._most = 100
    kept.ask(tokens_of(random.Random(2), 400))
    kept.run()
    assert kept.engine.keeper.flush(30)
    again = kept.ask(PROMPT)
    assert again.cached.tiers["disk"] > 0
    kept.end()


def test_what_is_held_for_a_while_goes_last_from_memory(tmp_path: Path) -> None:
    """Without a disk, too: an hour is asked for, and others pass through a small pool."""
    base = make_runner(LLAMA, kv="fp32")
    runner = Runner(base.model, base.layout, 14, base.backend, None, 2)
    engine = Engine(runner)
    now = [1000.0]
    engine.keeper._now = runner.manager.tree._clock = lambda: now[0]

    def ask(prompt: list[int], ttl: float = 0.0) -> Sequence:
        sequence = engine.add(Request(tuple(prompt), 2, ttl=ttl))
        while not engine.idle:
            engine.step()
            engine.check()
        return sequence

    ask(PROMPT, ttl=3600)
    for seed in range(5):
        ask(tokens_of(random.Random(seed), 200))
        now[0] += 600
    assert ask(PROMPT).cached.prompt >= 384
    now[0] += 3600
    for seed in range(5):
        ask(tokens_of(random.Random(seed), 400))
    assert ask(PROMPT).cached.prompt == 0


def test_two_engines_share_a_folder(left_behind: tuple[Path, Sequence], tmp_path: Path) -> None:
    one, two = Kept(tmp_path), Kept(tmp_path)
    cold = one.ask(PROMPT)
    assert one.engine.keeper.flush(30)
    warm = two.ask(PROMPT)
    assert warm.cached.tiers["disk"] == 384
    assert warm.new_tokens == cold.new_tokens == left_behind[1].new_tokens
    two.kept.close()
    one.end()


KILLED = """
import random, sys
from pathlib import Path
sys.path[:0] = {path!r}
from oracle import tokens_of
from test_kept import Kept
kept = Kept(Path(sys.argv[1]))
rng = random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    kept.ask(tokens_of(rng, 400))
"""


@pytest.mark.slow
def test_a_killed_engine_leaves_nothing_wrong(tmp_path: Path) -> None:
    """Twenty kills; whatever is found afterwards gives the tokens of a cold run."""
    rng, read = random.Random(4), 0
    program = tmp_path / "killed.py"
    program.write_text(KILLED.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    for seed in range(20):
        command = [sys.executable, str(program), str(tmp_path / "kv"), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "ready\n"
            time.sleep(0.3 + rng.random() * 0.5)
            engine.kill()
        prompt = tokens_of(random.Random(seed), 400)
        warm, cold = Kept(tmp_path / "kv"), Kept(tmp_path / f"cold-{seed}")
        found = warm.ask(prompt)
        assert found.new_tokens == cold.ask(prompt).new_tokens
        assert not warm.kept.counters.losses
        read += found.cached.tiers["disk"]
        warm.end()
        cold.end()
    assert read > 20 * 64
