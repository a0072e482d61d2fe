"""The folder of kept blocks: killed writers, full and read-only disks, links, jumping clocks, two at once, budgets."""

import errno
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_writer import PAYLOAD, SIZE, block_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvist.base.errors import ConfigError
from kvist.cache.disk import DiskTier
from kvist.cache.record import header, read_payload, record_bytes
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
    """Fifty kills each at a random moment; and all that was told to be kept is there."""
    rng, start, kept = random.Random(round_), 0, set[int]()
    caught = 0
    for _ in range(50):
        command = [sys.executable, str(WRITER), str(tmp_path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            timer = threading.Timer(rng.random() * 0.03, writer.kill)
            timer.start()
            told = [int(line) for line in writer.stdout if line.endswith("\n")]
            timer.join()
        kept |= set(told)
        caught += any(path.name.startswith(".tmp-") for path in tmp_path.rglob("*"))
        start = max(kept, default=0) + 2
    disk = DiskTier(tmp_path, 1 << 30)
    assert len(kept) > 10
    assert caught > 0  # in the middle of a file
    assert all(has(disk, number) for number in kept)
    files = {path.name for path in tmp_path.rglob("*.kv")}
    assert len(files) <= len(kept) + 50  # one that was whole and not yet told, at each kill
    assert all(has(disk, number) for number in range(start + 2) if path_of(tmp_path, number).name in files)


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


def test_damaged_files_are_never_read_as_blocks(tmp_path: Path) -> None:
    """Four hundred of them, some damaged before the folder is opened and some while it is."""
    from kvist.cache.record import BadRecord

    rng, kinds = random.Random(2), dict[str, int]()
    for trial in range(400):
        shutil.rmtree(tmp_path / "kv", ignore_errors=True)
        disk = DiskTier(tmp_path / "kv", 1 << 30)
        put(disk, trial)
        kind = damage(rng, path_of(tmp_path / "kv", trial))
        kinds[kind] = kinds.get(kind, 0) + 1
        if rng.random() < 0.5:
            disk.close()
            disk = DiskTier(tmp_path / "kv", 1 << 30)
        block, planes = block_of(trial)
        try:
            record = disk.get(block.name, RECORD)
            assert record is None or len(record) <= RECORD + 1
            found = None if record is None else bytes(read_payload(record, block, PAYLOAD))
        except (TierError, BadRecord):
            found = None
        assert found is None or (kind == "zeros" and found == planes)
        if path_of(tmp_path / "kv", trial).is_dir():
            (path_of(tmp_path / "kv", trial)).rmdir()
        disk.remove(block.name)
        assert put(disk, trial)  # and it can be written again
        assert has(disk, trial)
        disk.close()
    assert len(kinds) == 10
    assert min(kinds.values()) > 15


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
    (small_disk / "ballast").write_bytes(b"x")
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


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "utime"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_system_call_that_fails_leaves_nothing_behind(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    put(disk, 1)

    def fail(*rest: object, **more: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(TierError):
            put(disk, 2)
    assert not has(disk, 2)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(disk)
    assert put(disk, 2)
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


def test_a_namespace_keeps_to_its_own_share(tmp_path: Path) -> None:
    clock = Clock()
    disk = DiskTier(tmp_path, 20 * RECORD, clock=clock)
    mine, other = block_of(0)[0].name[:32], "f" * 32
    disk.limits = {other: 3 * RECORD}
    for number in range(10):
        clock.now += 1
        put(disk, number, clock.now)
        assert disk.put(f"{other}/{number:064x}", (bytes(RECORD),), clock.now)
    assert sum(name.startswith(mine) for name in disk._entries) == 10
    assert sorted(name[-1] for name in disk._entries if name.startswith(other)) == ["7", "8", "9"]
    disk.check()


def test_clocks_may_jump(tmp_path: Path) -> None:
    rng, clock = random.Random(6), Clock()
    disk = DiskTier(tmp_path, 8 * RECORD, max_age=1e6, clock=clock)
    for step in range(400):
        clock.now = rng.choice([clock.now + 1, 0.0, 1e9, 1.7e9, 1.8e9, 4e9, clock.now - 1e5, clock.now + 1e5])
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
            disk = DiskTier(tmp_path, 8 * RECORD, max_age=1e6, clock=clock)
        assert disk.used <= 8 * RECORD
        disk.check()


def test_two_on_one_folder_read_nothing_wrong(tmp_path: Path) -> None:
    """Each with a budget for all of it, so that together they may take as much as twice that, and no more."""
    rng, clock = random.Random(7), Clock()
    both = [DiskTier(tmp_path, 10 * RECORD, clock=clock) for _ in range(2)]
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
        most = max(most, len(list(tmp_path.rglob("*.kv"))))
    assert found > 100
    assert 10 <= most <= 20
    for disk in both:
        disk._scan()
        disk.check()


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(WRITER), str(tmp_path)]
    writers = [
        subprocess.Popen([*command, start], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) for start in ("0", "30")
    ]
    disk, seen = DiskTier(tmp_path, 1 << 30), 0
    try:
        for _ in range(60):
            for number in range(0, 200, 3):
                seen += has(disk, number)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert seen > 0


class DiskMachine(RuleBasedStateMachine):
    """Against a dictionary: what it has is right, and what was put lately is there."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self.clock = folder, Clock()
        self.disk = DiskTier(folder, 6 * RECORD, clock=self.clock)
        self.order: list[int] = []  # the least lately used first
        self.pinned: set[int] = set()

    def _use(self, number: int) -> None:
        self.order = [one for one in self.order if one != number] + [number]

    @rule(number=st.integers(0, 9))
    def put(self, number: int) -> None:
        self.clock.now += 1
        if put(self.disk, number, self.clock.now):  # what is held stays held
            self._use(number)
            while len(self.order) > 6:
                self.order.remove(next(one for one in self.order if one not in self.pinned))
        else:
            assert len(self.pinned) == 6

    @rule(number=st.integers(0, 9))
    def use(self, number: int) -> None:
        self.clock.now += 1
        self.disk.pin([block_of(number)[0].name], self.clock.now)
        if number in self.order:
            self._use(number)

    @rule(number=st.integers(0, 9))
    def hold(self, number: int) -> None:
        self.disk.pin([block_of(number)[0].name], math.inf)
        self.pinned |= {number} & set(self.order)

    @rule(number=st.integers(0, 9))
    def remove(self, number: int) -> None:
        self.disk.remove(block_of(number)[0].name)
        self.order = [one for one in self.order if one != number]
        self.pinned.discard(number)

    @invariant()
    def is_what_it_should_be(self) -> None:
        self.disk.check()
        assert {number for number in range(10) if has(self.disk, number)} == set(self.order)

    def teardown(self) -> None:
        self.disk.close()


def test_it_behaves_as_a_dictionary_with_a_budget(tmp_path: Path) -> None:
    chosen = settings(max_examples=25, stateful_step_count=25)
    run_state_machine_as_test(lambda: DiskMachine(tmp_path / "kv"), settings=chosen)


def test_the_check_notices_a_file_that_is_not_known(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1 << 30)
    put(disk, 1)
    disk.check()
    path_of(tmp_path, 1).unlink()
    with pytest.raises(AssertionError, match="1 blocks are known and 0 are there"):
        disk.check()
