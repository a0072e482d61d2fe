"""An engine whose kept blocks are damaged, gone, forged or unreachable: the tokens are those of a cold run, why is
counted and told, and the engine goes on."""

import errno
import functools
import logging
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_kept import Kept

from kvist.cache.kept import KeptCache
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, Loss, header, record_bytes
from kvist.cache.tier import Buffer
from kvist.runtime.request import FinishReason, Request, Sampling
from oracle import make_runner, tokens_of

SIZE, NEW = 64, 4
_RNG = random.Random(1)
_FIRST = tokens_of(_RNG, 400)
PROMPTS = [_FIRST, _FIRST[:256] + tokens_of(_RNG, 150), _FIRST[:130] + tokens_of(_RNG, 250), tokens_of(_RNG, 330)]


def chain(tokens: list[int], root: bytes) -> list[BlockId]:
    """The whole blocks of a prompt."""
    blocks, parent = list[BlockId](), root
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        blocks.append(BlockId.after(root, parent, tuple(tokens[start : start + SIZE])))
        parent = blocks[-1].key
    return blocks


BLOCKS = chain(_FIRST, root_key(b"a", ""))


@pytest.fixture(scope="module", autouse=True)
def _one_model() -> Iterator[None]:
    """Most of what an engine takes to begin is the making of its model, which is always the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("test_kept.make_runner", functools.cache(make_runner))
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: many trials, and what is synced there takes no time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("kept")
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Left:
    """What an engine has left in `folder`, and what each prompt comes to, cold."""

    folder: Path
    cold: list[list[int]]
    files: int

    def copy(self) -> Path:
        target = self.folder.parent / "trial"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.folder, target))


@pytest.fixture(scope="module")
def left(quick: Path) -> Left:
    first, cold = Kept(quick / "left"), list[list[int]]()
    for number, prompt in enumerate(PROMPTS):
        alone = Kept(quick / f"cold-{number}")
        cold.append(alone.ask(prompt, NEW).new_tokens)
        assert not alone.kept.counters.hits
        alone.end()
        first.ask(prompt, NEW)
    first.end()
    return Left(quick / "left", cold, len(list((quick / "left").rglob("*.kv"))))


def by_reason(kept: KeptCache) -> Counter[str]:
    """How many blocks were lost, whichever tier had them."""
    counts = Counter[str]()
    for (_, reason), count in kept.counters.losses.items():
        counts[reason.value] += count
    return counts


def told_losses(kept: Kept) -> None:
    """As a server does it: what the disk gave up is known as lost."""

    def lost(block: str, expired: bool) -> None:
        kept.kept.losses.add(block, Loss.EXPIRED if expired else Loss.EVICTED, "disk")

    kept.disk.lost = lost


def end(kept: Kept) -> None:
    kept.engine.check()
    assert not list(kept.engine.runner.manager.leases)
    assert kept.engine.keeper.flush(30)
    kept.kept.close()
    kept.disk.close()


def _flip(rng: random.Random, data: bytearray) -> bytearray:
    place = rng.choice([rng.randrange(8), rng.randrange(12, len(data)), rng.randrange(12, 400)])  # not in the version
    data[place] ^= 1 << rng.randrange(8)
    return data


def _of(block: BlockId, data: bytearray) -> bytearray:
    """A record of another block that is right in itself, with these planes."""
    planes = data[record_bytes(SIZE, 0) :]
    return bytearray(header(block, planes) + planes)


OTHER = chain(_FIRST, root_key(b"a", "other"))[2]
CONTENTS: dict[str, tuple[Loss, Callable[[random.Random, bytearray], bytearray]]] = {
    "cut": (Loss.TRUNCATED, lambda rng, data: data[: rng.randrange(len(data))]),
    "empty": (Loss.TRUNCATED, lambda rng, data: bytearray()),
    "grown": (Loss.TRUNCATED, lambda rng, data: data + rng.randbytes(rng.randrange(1, 9000))),
    "flipped": (Loss.CORRUPT, _flip),
    "noise": (Loss.CORRUPT, lambda rng, data: bytearray(rng.randbytes(len(data)))),
    "half zeros": (Loss.CORRUPT, lambda rng, data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)),
    "another version": (Loss.VERSION, lambda rng, data: data[:8] + rng.randbytes(3) + b"\x01" + data[12:]),
    "another's record": (Loss.FOREIGN, lambda rng, data: _of(chain(PROMPTS[3], BLOCKS[0].namespace)[1], data)),
    "another tenant's": (Loss.FOREIGN, lambda rng, data: _of(OTHER, data)),
}
# While the folder is in use; before that what is no file is as if it were not there.
PLACES: dict[str, tuple[Loss, Callable[[Path], None]]] = {
    "gone": (Loss.EVICTED, lambda path: None),
    "link": (Loss.UNREADABLE, lambda path: path.symlink_to(path.with_name("elsewhere"))),
    "link to a block": (Loss.UNREADABLE, lambda path: path.symlink_to(next(path.parent.glob("*.kv")))),
    "pipe": (Loss.UNREADABLE, os.mkfifo),
    "folder": (Loss.UNREADABLE, Path.mkdir),
}


@pytest.mark.parametrize("kind", [*CONTENTS, *PLACES])
def test_each_kind_of_damage_is_told_by_its_name(kind: str, left: Left, caplog: pytest.LogCaptureFixture) -> None:
    """Thirty trials each: what stands before the damage is read, the rest is computed and, if possible, mended."""
    for seed in range(30):
        rng, folder = random.Random(seed), left.copy()
        victim = rng.randrange(len(BLOCKS))
        path = folder / f"{BLOCKS[victim].name}.kv"
        before = rng.random() < 0.5 and kind in CONTENTS
        kept = None if before else Kept(folder)
        data = bytearray(path.read_bytes())
        path.unlink()
        if kind in CONTENTS:
            reason, change = CONTENTS[kind]
            path.write_bytes(change(rng, data))
        else:
            reason, place = PLACES[kind]
            place(path)
        kept = kept or Kept(folder)
        told_losses(kept)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kvist.cache"):
            warm = kept.ask(_FIRST, NEW)
            assert kept.engine.keeper.flush(30)
        counters = kept.kept.counters
        assert warm.new_tokens == left.cold[0]
        assert counters.hits == Counter(disk=victim)
        assert warm.loss is reason
        assert counters.losses["disk", reason] == 1
        assert counters.failures["disk", "read"] == (reason is Loss.UNREADABLE)
        assert bool(caplog.records) == (kind != "gone")
        end(kept)
        again = Kept(folder)
        assert again.ask(_FIRST, NEW).new_tokens == left.cold[0]
        assert again.kept.counters.hits["disk"] == (victim if kind == "folder" else len(BLOCKS))
        end(again)


def test_what_is_not_checked_is_noticed(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: planes that nobody checks give other tokens."""
    monkeypatch.setattr("kvist.cache.kept.read_payload", lambda record, block, payload: record[-payload:])
    wrong = 0
    for seed in range(20):
        rng, folder = random.Random(seed), left.copy()
        path = folder / f"{BLOCKS[seed % len(BLOCKS)].name}.kv"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes(rng.choices(b"\x3d\x3e\xbd\xbe", k=len(data) - len(data) // 2)))
        kept = Kept(folder)
        wrong += kept.ask(_FIRST, NEW).new_tokens != left.cold[0]
        assert kept.kept.counters.hits["disk"] == len(BLOCKS)
        end(kept)
    assert wrong > 10


class FailingOs:
    """The module `os`, of whose calls one in so many fails."""

    def __init__(self, rng: random.Random, rate: float) -> None:
        self.rng, self.rate, self.failed = rng, rate, 0

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in ("write", "fsync", "rename", "utime", "readv", "open", "stat", "fstat", "unlink", "mkdir"):
            return real

        def call(*rest: object, **more: object) -> object:
            if self.rng.random() < self.rate:
                self.failed += 1
                code = self.rng.choice([errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.ESTALE])
                raise OSError(code, os.strerror(code))
            return real(*rest, **more)

        return call


@pytest.mark.parametrize("part", range(4))
def test_a_disk_that_fails_now_and_then_changes_no_token(
    part: int, left: Left, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Forty trials each, with a restart in each over what is left."""
    hits = failed = counted = 0
    for seed in range(part * 40, part * 40 + 40):
        rng, folder = random.Random(seed), left.copy()
        failing = FailingOs(rng, rng.choice([0.02, 0.1, 0.5]))
        for kept in (Kept(folder, budget=rng.choice([8, 1000]) * 20_000), Kept(folder)):
            with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "kvist.cache"):
                patched.setattr("kvist.cache.kept._PAUSE", rng.choice([0.0, 0.001]))
                patched.setattr("kvist.cache.disk.os", failing)
                for number in rng.choices(range(len(PROMPTS)), k=3):
                    assert kept.ask(PROMPTS[number], NEW).new_tokens == left.cold[number]
                    assert kept.engine.keeper.flush(30)
                    kept.engine.runner.manager.tree.clear()
            hits += kept.kept.counters.hits["disk"]
            counted += sum(kept.kept.counters.failures.values())
            kept.disk._scan()
            kept.disk.check()
            assert kept.ask(PROMPTS[0], NEW).new_tokens == left.cold[0]
            end(kept)
        failed += failing.failed
    assert hits > 100
    assert failed > 300
    assert 100 < counted <= failed
    assert caplog.records


def _replaced_by(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(other)


FATES: dict[str, Callable[[Path], object]] = {
    "deleted": shutil.rmtree,
    "deleted and made again": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "emptied": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
    "a link to what is right": lambda folder: _replaced_by(folder, folder.parent / "left"),
    "a link to nothing": lambda folder: _replaced_by(folder, folder.parent / "nowhere"),
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"x")),
}


@pytest.mark.parametrize("fate", FATES)
def test_whatever_becomes_of_the_folder_the_engine_goes_on(
    fate: str, left: Left, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty trials each."""
    for seed in range(20):
        rng, folder = random.Random(seed), left.copy()
        kept = Kept(folder)
        told_losses(kept)
        numbers = rng.sample(range(len(PROMPTS)), len(PROMPTS))
        with caplog.at_level(logging.WARNING, "kvist.cache"):
            for place, number in enumerate(numbers):
                if place == 1 + seed % 2:
                    FATES[fate](folder)
                assert kept.ask(PROMPTS[number], NEW).new_tokens == left.cold[number]
                kept.engine.runner.manager.tree.clear()
            assert kept.engine.keeper.flush(30)
        losses = by_reason(kept.kept)
        assert kept.kept.counters.hits["disk"] >= 5  # before
        assert losses["evicted"]
        if fate != "emptied":  # which can be filled again
            assert losses["unwritten"]
            assert kept.kept.counters.failures["disk", "write"] == 1
        end(kept)
        if not folder.is_dir() or folder.is_symlink():
            folder.unlink(missing_ok=True)
    assert fate == "emptied" or "cannot write to" in caplog.text
    assert len(list(left.folder.rglob("*.kv"))) == left.files  # nothing was touched where the link leads to


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with room for the blocks of two prompts."""
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["-o", f"size={14 * 5 * 4096}"]
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=False)


def test_a_disk_that_is_full_and_then_read_only(small_disk: Path, left: Left, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(small_disk)
    told_losses(kept)
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        for number in (0, 1, 2, 3, 0, 1, 2, 3, 0):
            assert kept.ask(PROMPTS[number], NEW).new_tokens == left.cold[number]
            assert kept.engine.keeper.flush(30)
            kept.engine.runner.manager.tree.clear()
    assert kept.kept.counters.losses["disk", Loss.EVICTED] > 5  # the old have made room for the new
    assert kept.kept.counters.hits["disk"] > 5
    kept.disk.check()
    assert not list(small_disk.rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = kept.kept.counters.hits["disk"]
    with caplog.at_level(logging.WARNING, "kvist.cache"):
        for number in (0, 3, 1):
            assert kept.ask(PROMPTS[number], NEW).new_tokens == left.cold[number]
            kept.engine.runner.manager.tree.clear()
        assert kept.engine.keeper.flush(30)
    assert kept.kept.counters.hits["disk"] > before
    assert kept.kept.counters.failures["disk", "write"] == 1
    assert "Read-only" in caplog.text
    end(kept)


def test_clocks_that_jump_change_no_token(left: Left) -> None:
    """A hundred trials."""
    hits = expired = 0
    for seed in range(100):
        rng, budget = random.Random(seed), random.Random(seed).choice([12, 1000]) * 20_000
        kept = Kept(left.copy(), budget=budget)
        told_losses(kept)
        kept.disk._max_age = rng.choice([float("inf"), 3600.0])

        def clock(rng: random.Random = rng) -> float:
            return time.time() + rng.choice([0, 0, 0, 0, 1, -1, 3600, -3600, 1e8, -1e8, 1e10, -1e10])

        kept.disk._clock = kept.engine.keeper._now = clock
        for number in rng.choices(range(len(PROMPTS)), k=4):
            assert kept.ask(PROMPTS[number], NEW, ttl=rng.choice([0.0, 300.0])).new_tokens == left.cold[number]
            kept.engine.runner.manager.tree.clear()
        assert kept.engine.keeper.flush(30)
        kept.disk.check()
        hits, expired = hits + kept.kept.counters.hits["disk"], expired + kept.disk.expired
        assert not kept.kept.counters.failures
        end(kept)
    assert hits > 100
    assert expired > 20


def test_two_engines_on_a_folder_that_is_too_small_and_damaged(left: Left) -> None:
    """Three hundred prompts; now and then a file is damaged, or an engine begins anew."""
    rng, folder, seen = random.Random(5), left.copy(), Counter[str]()
    size = record_bytes(SIZE, Kept(folder).kept.payload)
    engines = [Kept(folder, budget=9 * size) for _ in range(2)]

    def count(kept: Kept) -> None:
        seen.update(kept.kept.counters.hits + by_reason(kept.kept) + Counter(evicted=kept.disk.evicted))
        end(kept)

    for step in range(300):
        kept = rng.choice(engines)
        told_losses(kept)
        number = rng.randrange(len(PROMPTS))
        assert kept.ask(PROMPTS[number], NEW).new_tokens == left.cold[number]
        assert kept.engine.keeper.flush(30)
        kept.engine.runner.manager.tree.clear()
        files = sorted(folder.rglob("*.kv"))
        assert len(files) <= 2 * 9
        if step % 5 == 0 and files:
            path = rng.choice(files)
            path.write_bytes(_flip(rng, bytearray(path.read_bytes())))
        if step % 20 == 0:
            count(engines.pop(rng.randrange(2)))
            engines.append(Kept(folder, budget=9 * size))
    for kept in engines:
        count(kept)
    assert seen["disk"] > 100
    assert seen["corrupt"] > 5
    assert seen["evicted"] > 100


@pytest.mark.parametrize("part", range(4))
def test_loads_that_are_cancelled_or_put_off_over_damaged_files(part: int, left: Left) -> None:
    """Fifty trials each: a pool that holds one prompt and little more, and a disk that is slow now and then."""
    seen = Counter[str]()
    for seed in range(part * 50, part * 50 + 50):
        rng, folder = random.Random(seed), left.copy()
        for path in rng.sample(sorted(folder.rglob("*.kv")), rng.randrange(3)):
            path.write_bytes(_flip(rng, bytearray(path.read_bytes())))
        kept = Kept(folder, blocks=rng.choice([9, 11, 40]))
        real = kept.disk.get

        def slow(block: str, size: int, rng: random.Random = rng, real: object = real) -> Buffer | None:
            time.sleep(rng.choice([0.0, 0.0, 0.002]))
            return real(block, size)  # type: ignore[no-any-return,operator]

        kept.disk.get = slow  # type: ignore[method-assign]
        asked = []
        for place, number in enumerate(rng.choices(range(len(PROMPTS)), k=4)):
            sampling = Sampling(temperature=1.0, seed=3)
            request = Request(tuple(PROMPTS[number]), NEW, sampling, priority=rng.choice([0, 1, 3 - place]))
            asked.append((number, kept.engine.add(request)))
            for _ in range(rng.randrange(8)):
                kept.engine.step()
                kept.engine.check()
            live = [sequence for _, sequence in asked if sequence.finish_reason is None]
            if live and rng.random() < 0.3:
                kept.engine.finish(rng.choice(live), FinishReason.CANCELLED)
        kept.run()
        for number, sequence in asked:
            cold = left.cold[number]
            assert sequence.new_tokens == cold[: len(sequence.new_tokens)]
            assert sequence.new_tokens == cold or sequence.finish_reason is FinishReason.CANCELLED
            seen["cancelled"] += sequence.finish_reason is FinishReason.CANCELLED
            seen["put off"] += sequence.preempted
        seen += kept.kept.counters.hits + by_reason(kept.kept)
        end(kept)
    assert seen["disk"] > 100
    assert seen["corrupt"] > 5
    assert seen["cancelled"] > 10
    assert seen["put off"] > 0
