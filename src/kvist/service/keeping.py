"""The kept cache of a model that is served: its tiers, and what else lies in their folder."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvist.base.errors import ConfigError, KvistError
from kvist.base.files import atomic_file, cache_folder, private_folder, read_json
from kvist.base.units import format_bytes
from kvist.cache.disk import DiskTier
from kvist.cache.kept import KeptCache
from kvist.cache.manager import CacheManager
from kvist.cache.record import Loss, record_bytes
from kvist.cache.shares import Share
from kvist.cache.tier import SharedTier, Tier
from kvist.cache.tiers import open_tier
from kvist.runtime.request import ADAPTER
from kvist.service.contexts import FOLDER, pin_all
from kvist.service.identity import Identity, identify
from kvist.service.loaded import Loaded
from kvist.service.openings import note_opening

log = logging.getLogger("kvist.cache")

DISK = 20 * 10**9  # bytes, where nothing else was ever given for a folder
_BUDGET = "budget.json"
_IDENTITIES = "identities"
_MOST_IDENTITIES = 256


@dataclass(frozen=True)
class KeepSettings:
    """`folder`: by default one for all models, beside the compiled kernels. `disk`: bytes that blocks may take there;
    by default what was last given for that folder. `max_age`: seconds after which what was not used is deleted.
    `remote`: URL of a store that machines share. `on_disk`: whether anything is kept in the folder."""

    folder: Path | None = None
    disk: int | None = None
    max_age: float = math.inf
    remote: str | None = None
    on_disk: bool = True

    @property
    def path(self) -> Path:
        return self.folder or cache_folder() / "kv"

    def budget(self) -> int:
        """Bytes that blocks may take. One that is given is remembered in the folder."""
        path = self.path / _BUDGET
        try:
            if not self.path.exists():
                private_folder(self.path)  # what somebody made for it stays as it was made
            if self.disk is not None:
                with atomic_file(path, 0o600) as target:
                    target.write_text(json.dumps({"disk": self.disk}))
                return self.disk
            found = read_json(path, 4096).get("disk") if path.exists() else None
        except KvistError as error:
            log.warning("%s", error)
            found = self.disk
        return found if type(found) is int and found > 0 else DISK


@dataclass(frozen=True)
class Kept:
    """What `open_kept` opened: the tiers that were asked for. `identity` is that of the model."""

    cache: KeptCache
    identity: Identity
    folder: DiskTier | None
    remote: SharedTier | None

    @property
    def disk(self) -> DiskTier:
        """The folder. Raises `ConfigError` where none was asked for."""
        if self.folder is None:
            raise ConfigError("nothing is kept on disk here; --cache-disk SIZE, as in 20GB, has it kept")
        return self.folder

    def share(self, limits: Mapping[str, int | None], manager: CacheManager, adapters: Iterable[str] = ()) -> None:
        """Give each of several tenants, by their ids, an equal part of the disk, and hold those with a limit (bytes) to
        it, what they have with `adapters` included."""
        if self.folder is None:
            return
        # One alone shares with nobody: what other models left goes by its age alone.
        part = self.folder.budget // len(limits) if len(limits) > 1 else 0
        for tenant, limit in limits.items():
            own = [manager.tree.root(f"{tenant}{ADAPTER}{adapter}") for adapter in adapters]
            namespaces = frozenset(root.key.hex()[:32] for root in (*manager.roots(tenant), *own))
            share = Share(namespaces, part, math.inf if limit is None else limit)
            self.folder.shares.update(dict.fromkeys(namespaces, share))

    def describe(self) -> list[str]:
        """A line for each tier."""
        lines, block = list[str](), format_bytes(self.cache.payload)
        if (disk := self.folder) is not None:
            used = f"{format_bytes(disk.used)} of {format_bytes(disk.budget)}"
            identity = self.identity.digest.hex()[:12]
            lines.append(f"kept in {disk.folder}: {len(disk):,} blocks, {used}, {block} each; identity {identity}")
        if self.remote is not None:
            lines.append(f"shared through {self.remote.place}: {block} each; {self.remote.budget}")
        return lines


@contextlib.contextmanager
def open_kept(loaded: Loaded, settings: KeepSettings) -> Iterator[Kept]:
    """The tiers for this model, until the end of the block. Raises `ConfigError` for a folder, a budget or a remote
    that cannot be."""
    identity = identify(loaded)
    with contextlib.ExitStack() as stack:
        remote = None
        if settings.remote is not None:
            remote = stack.enter_context(contextlib.closing(open_tier(settings.remote)))
        disk = stack.enter_context(contextlib.closing(_open_folder(loaded, settings))) if settings.on_disk else None
        tiers: list[Tier] = [tier for tier in (disk, remote) if tier is not None]
        cache = stack.enter_context(contextlib.closing(KeptCache(tiers, loaded.layout.block_bytes)))
        if disk is not None:
            _move_in(loaded, identity, disk, cache)
        yield Kept(cache, identity, disk, remote)


def _open_folder(loaded: Loaded, settings: KeepSettings) -> DiskTier:
    budget, size = settings.budget(), record_bytes(loaded.layout.block_size, loaded.layout.block_bytes)
    if budget < size:
        raise ConfigError(
            f"a budget of {format_bytes(budget)} on disk is too small: one block of this model takes "
            f"{format_bytes(size)}"
        )
    return DiskTier(settings.path, budget, settings.max_age)


def _move_in(loaded: Loaded, identity: Identity, disk: DiskTier, cache: KeptCache) -> None:
    """Join the folder to the cache, and leave a note of the model there."""

    def lost(block: str, expired: bool) -> None:
        cache.losses.add(block, Loss.EXPIRED if expired else Loss.EVICTED, disk.name)

    disk.lost = lost
    for name in (_IDENTITIES, FOLDER):
        try:
            private_folder(disk.folder / name)
        except KvistError as error:
            log.warning("%s", error)
    cache.rivals = _rivals(disk.folder, identity)
    _note(disk.folder, identity)
    if loaded.opening is not None:
        note_opening(disk.folder, identity, loaded.opening)
    pin_all(disk)


def _rivals(folder: Path, identity: Identity) -> tuple[bytes, ...]:
    """Under which other identities something of a model of the same name may lie there; told in the log."""
    found = []
    for path in sorted((folder / _IDENTITIES).glob("*.json"))[:_MOST_IDENTITIES]:
        try:
            other = Identity.of_json(read_json(path, 1 << 16))
        except KvistError:
            continue
        if other.model == identity.model and other.digest != identity.digest:
            found.append(other)
    for other in found:
        log.info(
            "what %s left under identity %s is not used: its %s differ",
            identity.model,
            other.digest.hex()[:12],
            ", ".join(identity.differences(other)),
        )
    return tuple(other.digest for other in found)


def _note(folder: Path, identity: Identity) -> None:
    """Leave a description of the identity beside the blocks, so that others can say what differs. Its time of
    modification is when a model was last opened under it."""
    path = folder / _IDENTITIES / f"{identity.digest.hex()[:32]}.json"
    try:
        if path.exists():
            os.utime(path)
        else:
            with atomic_file(path, 0o600) as target:
                target.write_text(json.dumps(identity.to_json(), indent=1))
    except (KvistError, OSError) as error:
        log.warning("%s", error)


def differs_today(folder: Path, identity: Identity) -> list[str]:
    """What was not the same, by name, when a model of that name was last opened over these codecs; nothing where it
    never was."""
    notes = []
    for path in sorted((folder / _IDENTITIES).glob("*.json"))[:_MOST_IDENTITIES]:
        with contextlib.suppress(KvistError, OSError):
            other = Identity.of_json(read_json(path, 1 << 16))
            if (other.model, other.kv) == (identity.model, identity.kv):
                notes.append((path.stat().st_mtime, other))
    return identity.differences(max(notes, key=lambda note: note[0])[1]) if notes else []
