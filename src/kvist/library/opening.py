"""A model, its cache and its engine's thread, opened as the library is asked for them."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvist.base.errors import KvistError
from kvist.base.units import parse_bytes
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import Opening
from kvist.service.serving import Serving

Bytes = int | str  # 2147483648 or "2GiB"


@dataclass(frozen=True)
class Wanted:
    """What an `LLM` is made of; see there."""

    model: Opening
    adapters: Mapping[str, str] = field(default_factory=dict)
    memory: Bytes | None = None
    threads: int | None = None
    cache_disk: Bytes | None = None
    cache_dir: str | None = None


def open_serving(wanted: Wanted, stack: contextlib.ExitStack) -> Serving:
    """Opened, and not started; what has to be closed in the end is the stack's. Raises `KvistError`."""
    set_threads(wanted.threads, "threads")
    if wanted.cache_dir is not None and wanted.cache_disk is None:
        raise KvistError("cache_dir says where the cache is kept on disk; cache_disk says how much of it, as in '20GB'")
    loaded = wanted.model.open({name: Path(folder) for name, folder in wanted.adapters.items()})
    budget = loaded.budget(_bytes(wanted.memory, "memory"))
    kept = None
    if wanted.cache_disk is not None:
        folder = None if wanted.cache_dir is None else Path(wanted.cache_dir).expanduser()
        settings = KeepSettings(folder, _bytes(wanted.cache_disk, "cache_disk"))
        kept = stack.enter_context(open_kept(loaded, settings))
    return Serving(loaded, loaded.engine(budget, kept), kept=kept)


def set_threads(threads: int | None, what: str) -> None:
    """Compute with so many threads, in processes that this one starts, too; None: as it is. Raises `KvistError`, which
    begins with `what`, for a number that does not fit the machine."""
    if threads is None:
        return
    most = os.cpu_count() or 1
    if not 1 <= threads <= most:
        raise KvistError(f"{what} takes a number from 1 to {most}, the cores of this machine; got {threads}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def _bytes(size: Bytes | None, what: str) -> int | None:
    if size is None or isinstance(size, int):
        return size
    return parse_bytes(size, what)
