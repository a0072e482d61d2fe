"""What lies in the cache folder: an entry for each folder that Kvist makes there, and nothing else that it finds."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import KvistError
from kvist.base.files import alone, cache_folder

KEPT, OPS = "kv", "ops"
WHAT = {
    OPS: "compiled kernels",
    "packed": "weights packed for --weights",
    "gguf": "configs and tokenizers of GGUF files",
    "weights": "digests of weight files",
    "widths": "measured widths of products",
    "calibration": "calibrations of codecs, and what they measured",
    "shapes": "random models of the benchmarks",
    KEPT: "kept blocks and contexts",
}


@dataclass(frozen=True)
class Entry:
    """A folder in the cache folder. `size`: bytes of its files. `written`: seconds of the epoch."""

    name: str
    path: str
    what: str
    size: int
    written: float

    @property
    def day(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self.written))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def entries() -> list[Entry]:
    """Those that are there. Raises `KvistError` when the cache folder cannot be used."""
    root = cache_folder()
    return [_entry(root / name) for name in WHAT if (root / name).is_dir() and not (root / name).is_symlink()]


@contextlib.contextmanager
def unused(chosen: Sequence[Entry]) -> Iterator[None]:
    """Keeps whoever would use these folders from it meanwhile. Raises `KvistError` where one of them is in use."""
    with contextlib.ExitStack() as stack:
        for entry in chosen:
            for path in _locked(entry):
                try:
                    free = stack.enter_context(alone(path))
                except OSError as error:
                    raise KvistError(f"cannot delete {entry.path}: {error.strerror or error}") from None
                if not free:
                    raise KvistError(
                        f"{entry.name} is in use: a running process has {path} locked; stop it (kvist serve, as a "
                        "rule), then clear it again"
                    )
        yield


def delete(entry: Entry) -> None:
    """The folder and all in it; no link is followed. Raises `KvistError`."""
    try:
        shutil.rmtree(entry.path)
    except OSError as error:
        raise KvistError(f"cannot delete {entry.path}: {error.strerror or error}") from None


def _locked(entry: Entry) -> list[Path]:
    """What those lock who may not lose it while they run. Others have read, or mapped, what they need."""
    path = Path(entry.path)
    return {KEPT: [path], OPS: sorted(path.glob("*/lock"))}.get(entry.name, [])


def _entry(path: Path) -> Entry:
    size, written = 0, 0.0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                found = os.lstat(os.path.join(folder, name))
            except OSError:  # deleted meanwhile
                continue
            size, written = size + found.st_size, max(written, found.st_mtime)
    return Entry(path.name, str(path), WHAT[path.name], size, written)
