"""Blocks as files in a folder, within a budget of bytes. docs/format.md says how it is laid out.

The folder itself is the index: a block's name says which it is, its length what it takes, and its time of modification
until when others go first. So nothing can disagree with the files, and two servers may share a folder: each finds what
the other has written when it looks for it, and neither reads half a file, as files are renamed into place once they are
synced. What is read is checked by whoever reads it.

Whoever has the folder open holds a lock on it together with the others, so that nobody clears it meanwhile.

Nothing here follows a symbolic link, and no part of a path comes from outside: names are digests in hexadecimal."""

import contextlib
import errno
import math
import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.base.errors import ConfigError, KvistError
from kvist.base.files import join, make_folders, own_folder
from kvist.cache.shares import Share
from kvist.cache.tier import Buffer, TierError

_NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(r"[0-9a-f]{64}\.kv")
_TEMPORARY = ".tmp-"
_STALE = 3600.0  # seconds after which a temporary file belongs to a process that has died
_RESCAN = 60.0  # seconds after which what other processes did is looked at again, before anything is given up
_PINNED = 365 * 86_400.0  # seconds from now: the time of a file that is pinned, as other processes see it
_LAST = 2.0**33  # seconds of the epoch: what comes later is no time of a file
_FULL = errno.ENOSPC, errno.EDQUOT
_SLACK = 50  # one part in so many of the budget is given up at once, so that not every block has to look for room
_NO_FOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class _Entry:
    size: int
    until: float  # when it was last used, or later: others go first until then


class DiskTier:
    """The folder `folder`, of which blocks may take `budget` bytes. `shares`, by namespace (the first half of blocks'
    names): what of that is whose. Blocks that were not used for `max_age` seconds are deleted. `lost(name, expired)` is
    told of every block that had to go.

    Raises `ConfigError` when the folder is none and cannot be made, or another user could write it.
    """

    name = "disk"

    def __init__(
        self,
        folder: Path,
        budget: int,
        max_age: float = math.inf,
        lost: Callable[[str, bool], None] = lambda name, expired: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.budget = budget
        self.shares: dict[str, Share] = {}
        self.evicted = self.expired = self.refused = 0  # blocks; refused: those there was no room for
        self._max_age = max_age
        self.lost = lost
        self._clock = clock
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._used = 0
        self._used_of: Counter[str] = Counter()  # by namespace
        try:
            own = own_folder(folder)
            make_folders(own)
            self._root = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not join(self._root):
                self.close()
                raise ConfigError(f"the cache folder {folder} is being cleared; start again once that is done")
        except OSError as error:
            raise ConfigError(f"the cache folder {folder} cannot be used: {error.strerror or error}") from None
        except KvistError as error:
            raise ConfigError(str(error)) from None
        self._scanned = -math.inf
        self._scan()

    def close(self) -> None:
        """Give up the folder. What a thread that is still at work asks from then on fails."""
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)

    @property
    def used(self) -> int:
        """Bytes that blocks take, as far as this process knows."""
        return self._used

    def __len__(self) -> int:
        """How many blocks there are, as far as this process knows."""
        return len(self._entries)

    def contains(self, block: str) -> bool:
        """Also finds what another process has written meanwhile."""
        with self._lock:
            entry = self._entries.get(block) or self._notice(block)
            if entry is not None and self._is_expired(entry):
                self._forget(block)
                entry = self._notice(block)  # another process may have used it since
                if entry is not None and self._is_expired(entry):
                    self._drop(block, expired=True)
                    return False
            return entry is not None

    def probe(self, block: str) -> bool:
        """See `Tier.probe`."""
        return self.contains(block)

    def get(self, block: str, size: int) -> Buffer | None:
        """See `Tier.get`."""
        if not self.contains(block):
            return None
        try:
            with self._open_folder(block) as folder:
                descriptor = os.open(_file(block), os.O_RDONLY | os.O_NONBLOCK | _NO_FOLLOW, dir_fd=folder)
                try:
                    return _read(descriptor, size)
                finally:
                    os.close(descriptor)
        except FileNotFoundError:  # another process has deleted it
            with self._lock:
                if block in self._entries:
                    self._forget(block)
                    self.lost(block, False)
            return None
        except OSError as error:
            self.remove(block)
            raise TierError(f"cannot read {block}: {error.strerror or error}") from None

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        """See `Tier.put`. The file is synced, renamed into place, and its folder synced, before it is found here."""
        _check(block)
        size = sum(memoryview(part).nbytes for part in record)
        if self._used + size > self.budget and not 0 <= self._clock() - self._scanned <= _RESCAN:
            self._scan()
        if not self._make_room(block, size, until):
            self.refused += 1
            return False
        try:
            self._write(block, record, until)
        except OSError as error:
            if error.errno not in _FULL or not self._make_room(block, size, until, full=True):
                raise TierError(f"cannot write to {self.folder}: {error.strerror or error}") from None
            try:
                self._write(block, record, until)
            except OSError as again:
                raise TierError(f"cannot write to {self.folder}: {again.strerror or again}") from None
        with self._lock:
            known = self._entries.get(block)
            self._forget(block)
            self._add(block, _Entry(size, until))
        if known is not None and known.until > until:  # held by somebody already
            self.pin([block], known.until)
        return True

    def pin(self, blocks: Sequence[str], until: float) -> None:
        """See `Tier.pin`. A block is never given up before those that stand behind it."""
        for place, block in enumerate(blocks):
            # Whoever stands nearer to the beginning stays longer.
            time = max(until, self._clock()) + (len(blocks) - place) * 1e-6
            with self._lock:
                entry = self._entries.get(block)
                if entry is None or entry.until >= time:
                    continue
                entry.until = time
            shown = self._shown(time)
            with contextlib.suppress(OSError), self._open_folder(block) as folder:
                os.utime(_file(block), (shown, shown), dir_fd=folder, follow_symlinks=False)

    def unpin(self, blocks: Sequence[str]) -> None:
        """These may go again when others need their room, as if they had been used just now."""
        for block in blocks:
            with self._lock:
                if (entry := self._entries.get(block)) is not None:
                    entry.until = 0.0
        self.pin(blocks, self._clock())

    def remove(self, block: str) -> None:
        """See `Tier.remove`."""
        with self._lock:
            self._forget(block)
        with contextlib.suppress(OSError), self._open_folder(block) as folder:
            os.unlink(_file(block), dir_fd=folder)

    def check(self) -> None:
        """Raises `AssertionError` unless what is known of the files is what they are."""
        known = {block: entry.size for block, entry in self._entries.items()}
        assert sum(known.values()) == self._used, "the bytes in use are not those of the blocks"
        found = {block: entry.size for block, entry in self._files()}
        assert known == found, f"{len(known)} blocks are known and {len(found)} are there"

    # ---- room

    def _make_room(self, block: str, size: int, until: float, full: bool = False) -> bool:
        """Whether `size` more bytes fit the budgets, others that are older than `until` being given up for them.
        `full`: the disk is, so as much has to go, whatever the budgets."""
        share = self.shares.get(block[:32])
        with self._lock:
            known = self._entries.get(block)
            size -= 0 if known is None or full else known.size  # which it replaces
            others = [name for name in self._entries if name != block]
            if share is not None and (excess := self._held(share) + size - share.limit) > 0:
                own = [name for name in others if self.shares.get(name[:32]) is share]
                self._give_up(own, excess, max(excess, share.limit // _SLACK), until, share, size)
            freed = 0
            if (excess := size if full else self._used + size - self.budget) > 0:
                wanted = excess if full else max(excess, self.budget // _SLACK)
                others = [name for name in others if name in self._entries]
                freed = self._give_up(others, excess, wanted, until, share, size)
            if full:
                return freed >= size
            fits = share is None or self._held(share) + size <= share.limit
            return fits and self._used + size <= self.budget

    def _give_up(
        self, blocks: list[str], needed: float, wanted: float, until: float, share: Share | None, size: int
    ) -> int:
        """Delete of these blocks for `size` bytes of `share`, until `wanted` bytes are free; returns how many are.

        Each time the oldest, of these: first what is nobody's part, for whatever is younger, and for a tenant within
        its own part whatever its age, of no known tenant's the older ones before the others. Then, no more than
        `needed`, what is within a part, for younger blocks of its tenant and of those who are within theirs. A pinned
        one never goes."""
        is_within = share is not None and self._held(share) + size <= share.part
        ordered = sorted(blocks, key=lambda name: self._age(self._entries[name]))
        freed = 0
        for stage, enough in enumerate((wanted, needed, needed)):
            for block in ordered:
                if freed >= enough:
                    return freed
                if (entry := self._entries.get(block)) is None or math.isinf(entry.until):
                    continue
                possible, time = self._age(entry)
                is_older = not possible or time <= until
                holder = self.shares.get(block[:32])
                if holder is share:
                    may = is_older and stage == (2 if is_within else 0)
                elif holder is None:
                    may = is_older if stage == 0 else is_within and stage == 1
                elif self._held(holder) > holder.part:
                    may = stage == 0 and (is_older or is_within)
                else:
                    may = stage == 2 and is_older and (is_within or share is None)
                if may:
                    freed += entry.size
                    self._drop(block, expired=self._is_expired(entry))
        return freed

    def _held(self, share: Share) -> int:
        """Bytes that its namespaces take."""
        return sum(self._used_of[namespace] for namespace in share.namespaces)

    def _age(self, entry: _Entry) -> tuple[bool, float]:
        """The least goes first. What no clock that is right can have asked for was written while the clock was wrong:
        it would stay until that time comes."""
        return math.isinf(entry.until) or entry.until <= self._clock() + 2 * _PINNED, entry.until

    def _shown(self, until: float) -> float:
        """What a file's time of modification says of it."""
        return max(0.0, min(until, self._clock() + _PINNED, _LAST))

    def _is_expired(self, entry: _Entry) -> bool:
        return self._clock() - entry.until > self._max_age

    def _drop(self, block: str, expired: bool) -> None:
        self.expired += expired
        self.evicted += not expired
        self.remove(block)
        self.lost(block, expired)

    def _forget(self, block: str) -> None:
        if (entry := self._entries.pop(block, None)) is not None:
            self._used -= entry.size
            self._used_of[block[:32]] -= entry.size

    def _add(self, block: str, entry: _Entry) -> _Entry:
        self._entries[block] = entry
        self._used += entry.size
        self._used_of[block[:32]] += entry.size
        return entry

    # ---- files

    def _notice(self, block: str) -> _Entry | None:
        """A block that another process has written; no file that takes more than all blocks may."""
        try:
            with self._open_folder(block) as folder:
                found = os.stat(_file(block), dir_fd=folder, follow_symlinks=False)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_size > self.budget:
            return None
        return self._add(block, _Entry(found.st_size, found.st_mtime))

    def _scan(self) -> None:
        """Learn from the files what is there, and delete what crashes left behind."""
        first, self._scanned = math.isinf(self._scanned), self._clock()
        found = dict(self._files(sweep=True))  # takes a while, in which others go on
        with self._lock:
            for block in [block for block in self._entries if block not in found]:
                self._forget(block)
                self._notice(block)  # it was written meanwhile, or is gone
            for block, entry in found.items():
                if (known := self._entries.get(block)) is not None:
                    self._forget(block)
                    self._add(block, _Entry(entry.size, max(entry.until, known.until)))
                elif first:
                    self._add(block, entry)
                else:
                    self._notice(block)  # unless it was given up meanwhile
            for block, entry in list(self._entries.items()):
                if (expired := self._is_expired(entry)) or entry.size > self.budget:
                    self._drop(block, expired)

    def _files(self, sweep: bool = False) -> Iterator[tuple[str, _Entry]]:
        for name in self._names():
            # The descriptor stays open, as what is said of an entry is looked up behind it.
            with contextlib.suppress(OSError), self._opened(name) as folder:
                for file in _listed(folder):
                    try:
                        found = file.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if not stat.S_ISREG(found.st_mode):
                        continue
                    if _FILE.fullmatch(file.name):
                        yield f"{name}/{file.name[:64]}", _Entry(found.st_size, found.st_mtime)
                    # Its time of modification may be set already: to when the block was used, long ago.
                    elif sweep and file.name.startswith(_TEMPORARY) and self._clock() - found.st_ctime > _STALE:
                        with contextlib.suppress(OSError):
                            os.unlink(file.name, dir_fd=folder)

    def _names(self) -> list[str]:
        """Those of the folders of namespaces."""
        with contextlib.suppress(OSError), self._opened(".") as root:
            return [folder.name for folder in _listed(root) if _FOLDER.fullmatch(folder.name)]
        return []

    def _write(self, block: str, record: Sequence[Buffer], until: float) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(block[:32], 0o700, dir_fd=self._root)
            os.fsync(self._root)
        with self._open_folder(block) as folder:
            temporary = f"{_TEMPORARY}{os.getpid()}-{threading.get_ident()}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _NO_FOLLOW, 0o600, dir_fd=folder)
            try:
                with open(descriptor, "wb", buffering=0) as file:
                    _write_all(file.fileno(), record)
                    os.utime(file.fileno(), (self._shown(until),) * 2)
                    os.fsync(file.fileno())
                os.rename(temporary, _file(block), src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            try:
                os.fsync(folder)
            except OSError:
                self.remove(block)
                raise

    def _open_folder(self, block: str) -> contextlib.AbstractContextManager[int]:
        """A descriptor of the folder of a block. Raises `OSError`."""
        _check(block)
        return self._opened(block[:32])

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """A descriptor of a folder in the folder. Raises `OSError`."""
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW, dir_fd=self._root)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _check(block: str) -> None:
    if not _NAME.fullmatch(block):
        raise ValueError(f"{block!r} is no name of a block")


def _file(block: str) -> str:
    return f"{block[33:]}.kv"


def _listed(folder: int) -> "list[os.DirEntry[str]]":
    """The entries of a folder, by its descriptor. Raises `OSError`."""
    with os.scandir(folder) as found:
        return list(found)


def _read(descriptor: int, size: int) -> bytearray:
    """The whole file, or its first `size` + 1 bytes. Raises `OSError` for what is no file."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a file")
    data = bytearray(min(found.st_size, size + 1))
    view, place = memoryview(data), 0
    while place < len(data):
        count = os.readv(descriptor, [view[place:]])
        if count == 0:
            break
        place += count
    view.release()
    del data[place:]
    return data


def _write_all(descriptor: int, record: Sequence[Buffer]) -> None:
    for part in record:
        view = memoryview(part).cast("B")
        while view.nbytes:
            view = view[os.write(descriptor, view) :]
