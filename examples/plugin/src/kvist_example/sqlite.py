"""Blocks in a SQLite file, which the processes of one machine share: `--cache-remote sqlite:///var/kvist.db?mib=512`."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

from kvist.base.errors import ConfigError
from kvist.cache.tier import Buffer, TierError

_TABLE = "CREATE TABLE IF NOT EXISTS records (name TEXT PRIMARY KEY, until REAL, size INTEGER, record BLOB)"
_INDEX = "CREATE INDEX IF NOT EXISTS first ON records (until, size)"
_PUT = "INSERT INTO records VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET until = max(until, excluded.until)"
_USED = "SELECT total(size) FROM records WHERE name != ?"
_FIRST = "SELECT name, size FROM records WHERE name != ? AND until <= ? ORDER BY until"
_MIB = 1024  # where the URL says nothing
_SECONDS = 0.5  # that it waits for another process


class SqliteTier:
    """The file at the URL's path, of which records may take `mib` MiB. Raises `ConfigError` where there can be none."""

    name = "sqlite"

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        size = parse_qs(parts.query).get("mib", [str(_MIB)])[0]
        if not size.isdecimal() or not 0 < int(size) < 1 << 30 or parts.netloc or len(parts.path) < 2:
            raise ConfigError(f"a tier in a SQLite file is sqlite:///a/path?mib=512; got {url!r}")
        self.place, self.budget = f"sqlite://{parts.path}", f"{size} MiB"
        self._most = int(size) << 20
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(parts.path, timeout=_SECONDS, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")  # what a power failure takes is computed again
            self._file.execute(_TABLE)
            self._file.execute(_INDEX)
        except sqlite3.Error as error:
            raise ConfigError(f"{self.place} cannot be opened: {error}") from None

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def contains(self, block: str) -> bool | None:
        return None  # only the file knows, and it may be busy

    def probe(self, block: str) -> bool:
        with self._asking() as file:
            return file.execute("SELECT 1 FROM records WHERE name = ?", (block,)).fetchone() is not None

    def get(self, block: str, size: int) -> Buffer | None:
        with self._asking() as file:
            found = file.execute("SELECT substr(record, 1, ?) FROM records WHERE name = ?", (size + 1, block))
            row = found.fetchone()
        return None if row is None else row[0]

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        data = b"".join(record)
        with self._writing() as file:
            excess = file.execute(_USED, (block,)).fetchone()[0] + len(data) - self._most
            given_up = []
            for name, size in file.execute(_FIRST, (block, until)) if excess > 0 else ():
                given_up.append((name,))
                excess -= size
                if excess <= 0:
                    break
            if excess > 0:
                return False
            file.executemany("DELETE FROM records WHERE name = ?", given_up)
            file.execute(_PUT, (block, until, len(data), data))
        return True

    def pin(self, blocks: Sequence[str], until: float) -> None:
        later = [(until + (len(blocks) - place) * 1e-6, block) for place, block in enumerate(blocks)]
        with self._writing() as file:
            file.executemany("UPDATE records SET until = ? WHERE name = ?", later)

    def remove(self, block: str) -> None:
        with self._writing() as file:
            file.execute("DELETE FROM records WHERE name = ?", (block,))

    @contextmanager
    def _asking(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._file
        except sqlite3.Error as error:
            raise TierError(f"{self.place}: {error}") from None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All of it, or nothing."""
        with self._asking() as file:
            file.execute("BEGIN IMMEDIATE")
            try:
                yield file
            except BaseException:
                file.execute("ROLLBACK")
                raise
            file.execute("COMMIT")
