"""The folder of kept blocks: killed writers, full and read-only disks, links, jumping clocks, two at once, budgets."""

import contextlib
import errno
import math
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_writer import PAYLOAD, SIZE, block_of
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvist.base.errors import ConfigError
from kvist.cache.disk import DiskTier, _Entry
from kvist.cache.record import BadRecord, header, read_payload, record_bytes
from kvist.cache.shares import Share
from kvist.cache.tier import TierError

RECORD = record_bytes(SIZE, PAYLOAD)
WRITER = Path(__file__).parent / "disk_writer.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


class Clock:
    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def put(disk: DiskTier, number: int, until: float = 0.0) -> bool:
    block, planes = block_of(number)
    return disk.put(block.name, (header(block, planes), planes), until)


def has(disk: DiskTier, number: int) -> bool:
    """Whether it is there; if so it is right."""
    block, planes = block_of(number)
    record = disk.get(block.name, RECORD)
    if record is None:
        return False
    assert bytes(read_payload(record, block, PAYLOAD)) == planes
    return True


def name_of(number: int) -> str:
    return block_of(number)[0].name


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: many trials, and what is synced there takes no time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def path_of(folder: Path, number: int) -> Path:
    return folder / f"{block_of(number)[0].name}.kv"


def test_what_was_put_is_there_and_there_after_a_restart(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10 * RECORD)
    assert all(put(disk, number) for number in range(5))
    assert all(has(disk, number) for number in range(5))
    assert not has(disk, 5)
    disk.check()
    again = DiskTier(tmp_path, 10 * RECORD)
    assert (len(again), again.used) == (5, 5 * RECORD)
    assert all(has(again, number) for number in range(5))
    assert path_of(tmp_path, 0).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("round_", range(4))
def test_a_killed_writer_leaves_whole_blocks_alone(round_: int, tmp_path: Path) -> None:
    """A hundred kills each at a random moment; and all that was told to be kept is there."""
    rng, start, kept, caught = random.Random(round_), 0, set[int](), 0
    command = [sys.executable, str(WRITER), str(tmp_path), str(1 << 30)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=ENVIRONMENT, **pipes) as writer:  # type: ignore[call-overload]
        assert writer.stdout.readline() == "ready\n"
        for _ in range(100):
            print(start, file=writer.stdin, flush=True)
            victim = int(writer.stdout.readline())
            told = [writer.stdout.readline() for _ in range(rng.randrange(3))]
            time.sleep(rng.random() * 0.005)
            os.kill(victim, signal.SIGKILL)
            while told[-1:] != ["dead\n"]:
                told.append(writer.stdout.readline())
            kept |= {int(line) for line in told[:-1]}
            caught += any(tmp_path.rglob(f".tmp-{victim}-*"))
            start = max(kept, default=0) + 2
        writer.stdin.close()
    disk = DiskTier(tmp_path, 1 << 30)
    assert len(kept) > 50
    assert caught > 0  # in the middle of a file
    assert all(has(disk, number) for number in kept)
    files = {path.name for path in tmp_path.rglob("*.kv")}
    assert len(files) <= len(kept) + 100  # one that was whole and not yet told, at each kill
    assert sum(has(disk, number) for number in range(start + 2)) == len(files)
    disk.check()
    assert list(tmp_path.rglob(".tmp-*"))
    DiskTier(tmp_path, 1 << 30, clock=lambda: time.time() + 2 * 3600)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_the_check_of_kills_notices_half_a_file(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    put(disk, 1)
    path_of(tmp_path, 1).write_bytes(path_of(tmp_path, 1).read_bytes()[:5000])
    with pytest.raises(BadRecord):
        has(disk, 1)


def test_what_killed_writers_left_is_swept_once_it_is_old(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    put(disk, 1)
    folder = path_of(tmp_path, 1).parent
    left = folder / ".tmp-1-1"
    left.write_bytes(b"half")
    DiskTier(tmp_path, 1 << 30)
    assert left.exists()
    DiskTier(tmp_path, 1 << 30, clock=lambda: time.time() + 2 * 3600)
    assert not left.exists()
    assert has(disk, 1)


def test_a_file_that_is_being_written_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old the block is: what others find in the time of the file is when it was used."""
    disk, real, looked = DiskTier(tmp_path, 1 << 30), os.fsync, list[int]()
    put(disk, 1)

    def look(descriptor: int) -> None:
        real(descriptor)
        looked.append(len(DiskTier(tmp_path, 1 << 30)))

    monkeypatch.setattr(os, "fsync", look)
    assert put(disk, 2, until=0.0)
    assert looked
    assert has(disk, 2)


def test_the_folder_of_a_namespace_is_synced_before_the_first_block_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, synced, real = DiskTier(tmp_path, 1 << 30), list[int](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor)))
    put(disk, 1)
    file = path_of(tmp_path, 1)
    assert synced == [tmp_path.stat().st_ino, file.stat().st_ino, file.parent.stat().st_ino]


def damage(rng: random.Random, path: Path) -> str:
    """Change a file in one of many ways; returns which."""
    data = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "grow", "empty", "zeros", "other", "link", "fifo", "folder", "gone"])
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    elif kind == "grow":
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 5000)))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes(len(data) - place))
    elif kind == "other":
        other, planes = block_of(999)
        path.write_bytes(header(other, planes) + planes)
    elif kind == "link":
        path.symlink_to("/etc/hostname")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    return kind


def test_damaged_files_are_never_read_as_blocks(quick: Path) -> None:
    """Six hundred of them, some damaged before the folder is opened and some while it is."""
    rng, kinds, open_before = random.Random(2), dict[str, int](), len(os.listdir("/proc/self/fd"))
    for trial in range(600):
        shutil.rmtree(quick / "kv", ignore_errors=True)
        disk = DiskTier(quick / "kv", 1 << 30)
        put(disk, trial)
        kind = damage(rng, path_of(quick / "kv", trial))
        kinds[kind] = kinds.get(kind, 0) + 1
        if rng.random() < 0.5:
            disk.close()
            disk = DiskTier(quick / "kv", 1 << 30)
        block, planes = block_of(trial)
        try:
            record = disk.get(block.name, RECORD)
            assert record is None or len(record) <= RECORD + 1
            found = None if record is None else bytes(read_payload(record, block, PAYLOAD))
        except (TierError, BadRecord):
            found = None
        assert found is None or (kind == "zeros" and found == planes)
        if path_of(quick / "kv", trial).is_dir():
            (path_of(quick / "kv", trial)).rmdir()
        disk.remove(block.name)
        assert put(disk, trial)  # and it can be written again
        assert has(disk, trial)
        disk.close()
    assert len(kinds) == 10
    assert min(kinds.values()) > 30
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_file_of_a_terabyte_takes_no_memory_and_pushes_nothing_out(quick: Path) -> None:
    clock = Clock()
    disk = DiskTier(quick, 10 * RECORD, clock=clock)
    for number in range(9):
        put(disk, number, clock.now)
    for number, size in ((3, 1 << 40), (4, 8 * RECORD)):
        os.truncate(path_of(quick, number), size)
    tracemalloc.start()
    for number in (3, 4):
        record = disk.get(name_of(number), RECORD)
        assert record is not None
        assert len(record) == RECORD + 1
        with pytest.raises(BadRecord):
            has(disk, number)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    disk.close()
    again = DiskTier(quick, 10 * RECORD, clock=clock)
    assert not again.contains(name_of(3))
    assert put(again, 3, clock.now + 1)
    assert has(again, 3)
    assert again.used <= 10 * RECORD


def test_a_file_that_is_gone_is_told_as_lost(tmp_path: Path) -> None:
    lost = list[tuple[str, bool]]()
    disk = DiskTier(tmp_path, 1 << 30, lost=lambda name, expired: lost.append((name, expired)))
    put(disk, 1)
    path_of(tmp_path, 1).unlink()
    assert not has(disk, 1)
    assert not has(disk, 1)
    assert lost == [(name_of(1), False)]
    disk.check()


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc/passwd", "..", "x" * 97, "0" * 32 + "/../" + "0" * 60, "0" * 32 + "/" + "G" * 64, ""]
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    with pytest.raises(ValueError, match="is no name of a block"):
        disk.put(name, (b"x",), 0.0)
    with pytest.raises(ValueError, match="is no name of a block"):
        disk.contains(name)


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    kept, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    put(DiskTier(elsewhere, 1 << 30), 1)
    kept.mkdir()
    namespace = path_of(elsewhere, 1).parent.name
    (kept / namespace).symlink_to(elsewhere / namespace)
    disk = DiskTier(kept, 1 << 30)
    assert len(disk) == 0
    assert not has(disk, 1)
    with pytest.raises(TierError):
        put(disk, 2)
    assert not path_of(elsewhere, 2).exists()


def test_a_folder_that_is_replaced_by_a_link_is_neither_listed_nor_swept(tmp_path: Path) -> None:
    kept, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    put(DiskTier(elsewhere, 1 << 30), 1)
    left = path_of(elsewhere, 1).parent / ".tmp-1-1"
    left.write_bytes(b"somebody else's")
    late = Clock(time.time() + 7200)
    disk = DiskTier(kept, 1 << 30, clock=late)
    put(disk, 2)
    shutil.rmtree(kept)
    kept.symlink_to(elsewhere)
    disk._scan()
    assert len(disk) == 0
    assert not has(disk, 1)
    with pytest.raises(TierError):
        put(disk, 3)
    disk.remove(name_of(1))
    disk.check()
    assert left.exists()
    assert has(DiskTier(elsewhere, 1 << 30), 1)


def test_a_tier_that_is_closed_writes_nowhere(tmp_path: Path) -> None:
    """A thread may be left behind in it, and the number of its folder's descriptor may be another's by then."""
    disk, other = DiskTier(tmp_path / "kv", 1 << 30), tmp_path / "other"
    put(disk, 1)
    other.mkdir()
    disk.close()
    descriptors = [os.open(other, os.O_RDONLY) for _ in range(8)]
    with pytest.raises(TierError, match="Bad file descriptor"):
        put(disk, 2)
    with pytest.raises(TierError, match="Bad file descriptor"):
        disk.get(name_of(1), RECORD)
    disk.close()
    assert not list(other.iterdir())
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be used"):
            DiskTier(path, 1 << 30)


def test_a_folder_that_vanishes_is_a_failure_and_no_more(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path / "kv", 1 << 30)
    put(disk, 1)
    shutil.rmtree(tmp_path / "kv")
    assert not has(disk, 1)
    with pytest.raises(TierError):
        put(disk, 2)
    assert not disk.contains(block_of(2)[0].name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=False)


def test_a_full_disk_gives_up_old_blocks_and_otherwise_fails_cleanly(small_disk: Path) -> None:
    disk = DiskTier(small_disk, 1 << 30)  # it promises more than there is
    for number in range(100):
        assert put(disk, number, until=number)
        assert has(disk, number)
    assert disk.evicted > 60
    disk.check()
    for block in list(disk._entries):
        disk.pin([block], math.inf)
    failures = list[str]()
    for number in range(200, 220):
        try:
            put(disk, number)
        except TierError as error:
            failures.append(str(error))
    assert len(failures) > 5
    assert all("No space left" in failure for failure in failures)
    assert not list(small_disk.rglob(".tmp-*"))
    disk.check()


def test_a_disk_that_may_only_be_read_is_read(small_disk: Path) -> None:
    put(DiskTier(small_disk, 1 << 30), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    disk = DiskTier(small_disk, 1 << 30)
    assert has(disk, 1)
    disk.pin([block_of(1)[0].name], math.inf)
    disk.remove(block_of(3)[0].name)
    with pytest.raises(TierError, match="Read-only"):
        put(disk, 2)


@pytest.mark.parametrize("call", ["write", "fsync", "fsync of the folder", "rename", "utime", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_system_call_that_fails_leaves_nothing_behind(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, real = DiskTier(tmp_path, 1 << 30), getattr(os, call.split()[0])
    put(disk, 1)
    if call == "mkdir":
        shutil.rmtree(path_of(tmp_path, 1).parent)

    def fail(*rest: object, **more: object) -> None:
        if call.endswith("folder") and not stat.S_ISDIR(os.fstat(rest[0]).st_mode):  # type: ignore[arg-type]
            return real(*rest)  # type: ignore[no-any-return]
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call.split()[0], fail)
        with pytest.raises(TierError):
            put(disk, 2)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == (call != "mkdir" and len(disk))
    assert not has(disk, 2)
    assert put(disk, 2)
    assert has(disk, 2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_where_nothing_more_fits_the_oldest_makes_room(code: int, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget promises more than the disk, or a quota, gives."""
    disk, real = DiskTier(quick, 1 << 30), os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(list(quick.rglob("*.kv"))) >= 5:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    for number in range(200):
        assert put(disk, number, until=number)
        disk.check()
    assert [number for number in range(200) if has(disk, number)] == [195, 196, 197, 198, 199]
    assert disk.evicted == 195


def test_failing_calls_at_random_moments_leave_a_folder_that_is_right(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight hundred acts in which one call in ten fails."""
    rng, disk, failed = random.Random(12), DiskTier(quick, 6 * RECORD), 0
    names = ("write", "fsync", "rename", "utime", "readv", "open", "stat", "unlink", "mkdir", "fstat")
    for name in names:
        monkeypatch.setattr(os, name, _failing_at_times(getattr(os, name), rng))
    for step in range(800):
        number = rng.randrange(12)
        with contextlib.suppress(BadRecord):
            try:
                put(disk, number, step) if rng.random() < 0.5 else has(disk, number)
            except TierError:
                failed += 1
    monkeypatch.undo()
    assert failed > 100
    disk._scan()
    disk.check()
    assert put(disk, 99, 1000.0)
    assert disk.used <= 6 * RECORD
    assert sum(has(disk, number) for number in (*range(12), 99)) == len(disk) > 0


def _failing_at_times(real: object, rng: random.Random) -> object:
    def call(*rest: object, **more: object) -> object:
        if rng.random() < 0.1:
            code = rng.choice([errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES])
            raise OSError(code, os.strerror(code))
        return real(*rest, **more)  # type: ignore[operator]

    return call


def test_nobody_waits_for_a_disk_that_is_slow_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, gate, real = DiskTier(tmp_path, 1 << 30), threading.Event(), os.fsync
    put(disk, 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: gate.wait(10) and real(descriptor))
    writer = threading.Thread(target=put, args=(disk, 2))
    writer.start()
    started = time.monotonic()
    assert has(disk, 1)
    assert not disk.contains(name_of(2))
    assert time.monotonic() - started < 5
    gate.set()
    writer.join(10)
    assert has(disk, 2)


def test_the_oldest_go_first_and_what_is_held_stays(tmp_path: Path) -> None:
    clock, lost = Clock(), list[tuple[str, bool]]()
    disk = DiskTier(tmp_path, 10 * RECORD, lost=lambda name, expired: lost.append((name, expired)), clock=clock)
    names = {number: block_of(number)[0].name for number in range(40)}
    for number in range(10):
        clock.now += 1
        assert put(disk, number, clock.now)
    disk.pin([names[0]], math.inf)
    disk.pin([names[1]], clock.now + 3600)
    disk.pin([names[2]], clock.now)  # used
    for number in range(10, 14):
        clock.now += 1
        assert put(disk, number, clock.now)
    assert {number for number in range(14) if disk.contains(names[number])} == {0, 1, 2, *range(7, 14)}
    assert [name for name, _ in lost] == [names[number] for number in range(3, 7)]
    # Nothing is younger than what is held for an hour, so nothing else is written, until the hour is over.
    for number in range(7, 14):
        disk.pin([names[number]], clock.now + 3600)
    disk.pin([names[2]], clock.now + 3600)
    assert not put(disk, 20, clock.now)
    assert put(disk, 21, clock.now + 7200)
    clock.now += 4000
    assert put(disk, 22, clock.now)
    assert disk.contains(names[0])
    disk.check()


def test_what_is_held_stays_held_when_it_is_written_again(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 3 * RECORD, clock=clock)
    for number in range(3):
        put(disk, number, clock.now)
    disk.pin([name_of(0)], math.inf)
    disk.pin([name_of(1)], clock.now + 3600)
    assert put(disk, 0, clock.now)
    assert put(disk, 1, clock.now)
    for number in range(10, 20):
        clock.now += 1
        assert put(disk, number, clock.now)
    assert disk.contains(name_of(0))
    assert disk.contains(name_of(1))
    # Another process, or this one after a restart, sees as much in the file.
    assert path_of(tmp_path, 0).stat().st_mtime > clock.now + 86_400 * 300
    disk.unpin([name_of(0)])
    assert put(disk, 20, clock.now + 1)
    assert put(disk, 21, clock.now + 2)
    assert not disk.contains(name_of(0))


def test_without_end_is_a_time_as_well(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 2 * RECORD)
    assert put(disk, 1, math.inf)
    assert put(disk, 2, 1e300)  # no time at all
    assert put(disk, 3, time.time())
    assert not has(disk, 2)
    assert has(disk, 1)
    disk.pin([name_of(3)], math.inf)
    assert not put(disk, 4, math.inf)


def test_a_larger_record_in_the_place_of_a_smaller_keeps_to_the_budget(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10_000)
    names = [f"{'f' * 32}/{number:064x}" for number in range(10)]
    for place, name in enumerate(names):
        assert disk.put(name, (bytes(1000),), place)
    assert disk.put(names[0], (bytes(1999),), 100.0)
    assert disk.used <= 10_000
    assert disk.contains(names[0])
    assert not disk.contains(names[1])
    disk.check()


def test_a_part_of_the_budget_is_given_up_at_once(quick: Path) -> None:
    """A fiftieth, so that not every block has to look for room."""
    disk, lost = DiskTier(quick, 100_000), list[str]()
    disk.lost = lambda name, expired: lost.append(name)
    for number in range(1000):
        assert disk.put(f"{'f' * 32}/{number:064x}", (bytes(100),), number)
    assert not lost
    assert disk.put(f"{'f' * 32}/{1000:064x}", (bytes(100),), 1000)
    assert [int(name[33:], 16) for name in lost] == list(range(20))
    assert disk.used == 98_100
    for number in range(1001, 1020):
        assert disk.put(f"{'f' * 32}/{number:064x}", (bytes(100),), number)
    assert len(lost) == 20


def test_a_block_never_goes_before_those_behind_it(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 10 * RECORD, clock=clock)
    chain = list(range(8))
    for number in chain:
        put(disk, number, clock.now - number * 1e-6)
    disk.pin([block_of(number)[0].name for number in chain], clock.now)
    for number in range(100, 108):
        clock.now += 1
        put(disk, number, clock.now)
        there = [disk.contains(block_of(one)[0].name) for one in chain]
        assert there == sorted(there, reverse=True)
    assert not any(there[6:])


def test_what_is_too_old_is_deleted(tmp_path: Path) -> None:
    clock, lost = Clock(), list[bool]()
    disk = DiskTier(tmp_path, 1 << 30, max_age=100, lost=lambda name, expired: lost.append(expired), clock=clock)
    put(disk, 1, clock.now)
    put(disk, 2, clock.now + 3600)
    clock.now += 101
    assert not has(disk, 1)
    assert has(disk, 2)
    assert lost == [True]
    clock.now += 3600
    assert len(DiskTier(tmp_path, 1 << 30, max_age=100, clock=clock)) == 0
    assert not list(tmp_path.rglob("*.kv"))


def test_what_another_process_has_used_is_not_too_old(tmp_path: Path) -> None:
    clock = Clock()
    one, other = (DiskTier(tmp_path, 1 << 30, max_age=100, clock=clock) for _ in range(2))
    for number in range(3):
        put(one, number, clock.now)
    other._scan()
    clock.now += 90
    other.pin([name_of(0)], clock.now)
    other.pin([name_of(1)], math.inf)
    clock.now += 20
    assert [has(one, number) for number in range(3)] == [True, True, False]
    assert (one.expired, one.evicted) == (1, 0)
    one.check()


def test_a_namespace_keeps_to_its_own_share(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 20 * RECORD, clock=clock)
    mine, other = block_of(0)[0].name[:32], "f" * 32
    disk.shares = {other: Share(frozenset({other}), limit=3 * RECORD)}
    for number in range(10):
        clock.now += 1
        put(disk, number, clock.now)
        assert disk.put(f"{other}/{number:064x}", (bytes(RECORD),), clock.now)
    assert sum(name.startswith(mine) for name in disk._entries) == 10
    assert sorted(name[-1] for name in disk._entries if name.startswith(other)) == ["7", "8", "9"]
    disk.check()


def test_clocks_may_jump(quick: Path) -> None:
    rng, clock = random.Random(6), Clock()
    disk = DiskTier(quick, 8 * RECORD, max_age=1e6, clock=clock)
    for step in range(1000):
        there = [0.0, -1e9, 1e9, 1.7e9, 1.8e9, 4e9, 1e20, -1e20]
        clock.now = rng.choice([clock.now + 1, *there, clock.now - 1e5, clock.now + 1e5])
        number = rng.randrange(30)
        act = rng.randrange(5)
        if act < 2:
            put(disk, number, clock.now + rng.choice([0, 300, 3600]))
        elif act == 2:
            disk.pin([block_of(number)[0].name], clock.now)
        elif act == 3:
            has(disk, number)
        elif step % 7 == 0:
            disk.close()
            disk = DiskTier(quick, 8 * RECORD, max_age=1e6, clock=clock)
        assert disk.used <= 8 * RECORD
        disk.check()


@pytest.mark.parametrize("wrong", [0.0, 1e9, 4e9, 1e20])
@pytest.mark.parametrize("restarted", [False, True])
def test_once_a_clock_is_right_again_so_is_the_order(wrong: float, restarted: bool, quick: Path) -> None:
    """What was written while it was years ahead does not stay until that time comes, nor does anything else suffer."""
    clock = Clock()
    right = clock.now
    disk = DiskTier(quick, 10 * RECORD, clock=clock)
    put(disk, 0, right)
    disk.pin([name_of(0)], math.inf)
    clock.now = wrong
    assert sum(put(disk, number, wrong + number) for number in range(1, 12)) >= (wrong > right) * 11
    clock.now = right
    if restarted:
        disk.close()
        disk = DiskTier(quick, 10 * RECORD, clock=clock)
        disk.pin([name_of(0)], math.inf)
    for number in range(100, 120):
        clock.now += 1
        assert put(disk, number, clock.now)
        assert has(disk, 0)
    assert [number for number in range(120) if has(disk, number)] == [0, *range(111, 120)]
    disk.check()


def test_two_on_one_folder_read_nothing_wrong(quick: Path) -> None:
    """Each with a budget for all of it, so that together they may take as much as twice that, and no more."""
    rng, clock = random.Random(7), Clock()
    both = [DiskTier(quick, 10 * RECORD, clock=clock) for _ in range(2)]
    found = most = 0
    for _ in range(1500):
        clock.now += 1
        disk, number = rng.choice(both), rng.randrange(40)
        act = rng.randrange(6)
        if act < 2:
            put(disk, number, clock.now)
        elif act == 2:
            disk.remove(block_of(number)[0].name)
        else:
            found += has(disk, number)
        most = max(most, len(list(quick.rglob("*.kv"))))
    assert found > 100
    assert 10 <= most <= 20
    for disk in both:
        disk._scan()
        disk.check()


def test_threads_and_tiers_on_one_folder_read_nothing_wrong(quick: Path) -> None:
    """Two tiers, three threads in each. A thread may have made room for one block more than there is, so that the two
    take no more than the budget each and a block for each thread."""
    both, errors, found = [DiskTier(quick, 8 * RECORD) for _ in range(2)], list[BaseException](), [0] * 6

    def work(place: int) -> None:
        rng, disk = random.Random(place), both[place % 2]
        try:
            for step in range(400):
                number, act = rng.randrange(30), rng.randrange(8)
                if act < 3:
                    put(disk, number, float(step))
                elif act == 3:
                    disk.remove(name_of(number))
                elif act == 4:
                    disk.pin([name_of(number)], 0.0)
                elif step % 40 == 5:
                    disk._scan()
                else:
                    found[place] += has(disk, number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(list(quick.rglob("*.kv"))))
    for thread in threads:
        thread.join(20)
    assert not errors
    assert sum(found) > 200
    assert 8 <= most <= 2 * 8 + 6
    assert not list(quick.rglob(".tmp-*"))
    for disk in both:
        disk._scan()
        disk.check()
        assert put(disk, 99, time.time() + 3600)
        assert disk.used <= 8 * RECORD


def test_what_is_given_up_while_the_folder_is_listed_is_not_known_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    for number in range(3):
        put(disk, number)
    listed = disk._files

    def files(sweep: bool = False) -> Iterator[tuple[str, _Entry]]:
        yield from listed(sweep)
        disk.remove(name_of(1))
        put(disk, 7)

    with monkeypatch.context() as patched:
        patched.setattr(disk, "_files", files)
        disk._scan()
    disk.check()
    assert [number for number in range(8) if has(disk, number)] == [0, 2, 7]


def test_two_processes_on_one_folder(quick: Path) -> None:
    """Both write the same blocks again and again, with room for half of them; a third reads them all the while."""
    command = [sys.executable, str(WRITER), str(quick), str(10 * RECORD)]
    writers = [
        subprocess.Popen([*command, start, "20"], stdout=subprocess.DEVNULL, env=ENVIRONMENT) for start in ("0", "5")
    ]
    disk, seen, most = DiskTier(quick, 1 << 30), 0, 0
    try:
        end = time.monotonic() + 30
        while (seen < 3000 or most < 10) and time.monotonic() < end:
            seen += sum(has(disk, number) for number in range(25))
            most = max(most, len(list(quick.rglob("*.kv"))))
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert seen >= 3000
    assert 10 <= most <= 2 * 10
    last = DiskTier(quick, 10 * RECORD)
    assert put(last, 99, time.time() + 3600)  # later than any that the writers may have held, which is until now
    assert last.used <= 10 * RECORD
    last.check()


ROOM, NUMBERS = 4, st.integers(0, 7)


class DiskMachine(RuleBasedStateMachine):
    """Against a dictionary of when each block was used, or until when it is held."""

    def __init__(self, folder: Path, tier: type[DiskTier]) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.clock, self.tier = folder, Clock(), tier
        self.disk = tier(folder, ROOM * RECORD, clock=self.clock)
        self.until: dict[int, float] = {}

    # No two times are the same, as each act takes a second and these differ by parts of one.
    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=4), ttl=st.sampled_from([0.0, 0.0, 10.25, 300.5]))
    def put(self, numbers: list[int], ttl: float) -> None:
        for number in numbers:
            self._put(number, ttl)

    def _put(self, number: int, ttl: float) -> None:
        self.clock.now += 1
        until = self.clock.now + ttl
        others = sorted(self.until[one] for one in self.until if one != number)
        kept = put(self.disk, number, until)
        assert kept == (len(others) < ROOM or others[0] <= until)
        if kept:
            if len(others) == ROOM:
                self.until = {one: time for one, time in self.until.items() if time != others[0] or one == number}
            self.until[number] = max(until, self.until.get(number, 0.0))

    @rule(number=NUMBERS, ttl=st.sampled_from([0.0, 10.25, 300.5]))
    def use(self, number: int, ttl: float) -> None:
        self.clock.now += 1
        self.disk.pin([name_of(number)], self.clock.now + ttl)
        if number in self.until:
            self.until[number] = max(self.until[number], self.clock.now + ttl)

    @rule(number=NUMBERS)
    def hold(self, number: int) -> None:
        self.disk.pin([name_of(number)], math.inf)
        if number in self.until:
            self.until[number] = math.inf

    @rule()
    def use_all(self) -> None:
        for number in list(self.until):
            self.use(number, 300.5)

    @rule(number=NUMBERS)
    def let_go(self, number: int) -> None:
        self.clock.now += 1
        self.disk.unpin([name_of(number)])
        if number in self.until:
            self.until[number] = self.clock.now

    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        self.disk.remove(name_of(number))
        self.until.pop(number, None)

    @rule(number=NUMBERS)
    def vanish(self, number: int) -> None:
        path_of(self.folder, number).unlink(missing_ok=True)
        self.until.pop(number, None)

    @rule()
    def restart(self) -> None:
        """The files alone say when each was used, and what was held without end is held for a year."""
        self.disk.close()
        self.disk = self.tier(self.folder, ROOM * RECORD, clock=self.clock)

    @rule()
    def an_hour_passes(self) -> None:
        self.clock.now += 3600

    @invariant()
    def is_what_it_should_be(self) -> None:
        assert {number for number in range(8) if has(self.disk, number)} == set(self.until)
        assert self.disk.used <= ROOM * RECORD
        self.disk.check()

    def teardown(self) -> None:
        self.disk.close()


def test_it_behaves_as_a_dictionary_with_a_budget(quick: Path) -> None:
    chosen = settings(max_examples=100, stateful_step_count=40)
    run_state_machine_as_test(lambda: DiskMachine(quick / "kv", DiskTier), settings=chosen)


class HoldsNothing(DiskTier):
    def _give_up(self, blocks: list[str], excess: float, until: float) -> int:
        return super()._give_up(blocks, excess, 1e10)


class GivesUpTheYoungest(DiskTier):
    def _give_up(self, blocks: list[str], excess: float, until: float) -> int:
        for entry in self._entries.values():
            entry.until = -entry.until
        freed = super()._give_up(blocks, excess, until)
        for entry in self._entries.values():
            entry.until = -entry.until
        return freed


class ForgetsToCount(DiskTier):
    def _forget(self, block: str) -> None:
        self._entries.pop(block, None)


class ForgetsTheTime(DiskTier):
    def _shown(self, until: float) -> float:
        return 0.0


@pytest.mark.parametrize("broken", [HoldsNothing, GivesUpTheYoungest, ForgetsToCount, ForgetsTheTime])
def test_the_machine_notices_a_broken_tier(broken: type[DiskTier], quick: Path) -> None:
    chosen = settings(max_examples=100, stateful_step_count=40, phases=[Phase.generate], print_blob=False)
    with pytest.raises((Exception, ExceptionGroup)):
        run_state_machine_as_test(lambda: DiskMachine(quick / "kv", broken), settings=chosen)


def test_the_check_notices_a_file_that_is_not_known(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    put(disk, 1)
    disk.check()
    path_of(tmp_path, 1).unlink()
    with pytest.raises(AssertionError, match="1 blocks are known and 0 are there"):
        disk.check()
