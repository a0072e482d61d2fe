"""The kept cache of a model that is served: its tiers, and what else lies in their folder."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvist.base.errors import ConfigError, KvistError
from kvist.base.files import atomic_file, cache_folder, read_json
from kvist.base.units import format_bytes
from kvist.cache.disk import DiskTier
from kvist.cache.kept import KeptCache
from kvist.cache.manager import CacheManager
from kvist.cache.record import Loss, record_bytes
from kvist.cache.tier import Tier
from kvist.runtime.request import ADAPTER
from kvist.service.contexts import pin_all
from kvist.service.identity import Identity, identify
from kvist.service.loaded import Loaded
from kvist.service.openings import note_opening
from kvist.service.tenants import Tenant

log = logging.getLogger("kvist.cache")

DISK = 20 * 10**9  # bytes, where nothing else was ever given for a folder
_BUDGET = "budget.json"
_IDENTITIES = "identities"
_MOST_IDENTITIES = 256


@dataclass(frozen=True)
class KeepSettings:
    """`folder`: by default one for all models, beside the compiled kernels. `disk`: bytes that blocks may take there;
    by default what was last given for that folder. `max_age`: seconds after which what was not used is deleted.
    `remote`: URL of a store that machines share."""

    folder: Path | None = None
    disk: int | None = None
    max_age: float = math.inf
    remote: str | None = None

    @property
    def path(self) -> Path:
        return self.folder or cache_folder() / "kv"

    def budget(self) -> int:
        """Bytes that blocks may take. One that is given is remembered in the folder."""
        path = self.path / _BUDGET
        try:
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
    """What `open_kept` opened. `identity` is that of the model. `remote`: the store that machines share, without its
    password."""

    cache: KeptCache
    disk: DiskTier
    identity: Identity
    remote: str | None = None

    def limit(self, tenants: Iterable[Tenant], manager: CacheManager, adapters: Iterable[str] = ()) -> None:
        """Hold tenants to their own shares of the disk: what each of their namespaces may take there, those of
        `adapters` included."""
        for tenant in tenants:
            if tenant.disk is None:
                continue
            own = [manager.tree.root(f"{tenant.id}{ADAPTER}{adapter}") for adapter in adapters]
            for root in (*manager.roots(tenant.id), *own):
                self.disk.limits[root.key.hex()[:32]] = tenant.disk or 0

    def describe(self) -> str:
        """One line."""
        block = self.cache.payload
        shared = "" if self.remote is None else f"; shared in {self.remote}"
        return (
            f"kept in {self.disk.folder}: {len(self.disk):,} blocks, {format_bytes(self.disk.used)} of "
            f"{format_bytes(self.disk.budget)}, {format_bytes(block)} each; identity {self.identity.digest.hex()[:12]}"
            f"{shared}"
        )


@contextlib.contextmanager
def open_kept(loaded: Loaded, settings: KeepSettings) -> Iterator[Kept]:
    """The tiers for this model, until the end of the block. Raises `ConfigError` for a folder, a budget or a remote
    that cannot be."""
    identity = identify(loaded)
    payload = loaded.layout.block_bytes
    size = record_bytes(loaded.layout.block_size, payload)
    budget = settings.budget()
    if budget < size:
        raise ConfigError(
            f"a budget of {format_bytes(budget)} on disk is too small: one block of this model takes "
            f"{format_bytes(size)}"
        )
    disk = DiskTier(settings.path, budget, settings.max_age)
    tiers: list[Tier] = [disk]
    remote = None
    if settings.remote is not None:
        from kvist.cache.remote import RemoteTier

        store = RemoteTier(settings.remote)
        tiers.append(store)
        remote = store.shown
    cache = KeptCache(tiers, payload)
    disk.lost = lambda block, expired: cache.losses.add(block, Loss.EXPIRED if expired else Loss.EVICTED)
    cache.rivals = _rivals(settings.path, identity)
    _note(settings.path, identity)
    if loaded.opening is not None:
        note_opening(settings.path, identity, loaded.opening)
    pin_all(disk)
    try:
        yield Kept(cache, disk, identity, remote)
    finally:
        cache.close()
        disk.close()


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
