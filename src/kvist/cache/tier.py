"""Where blocks are kept outside of the store's memory. A tier holds records by name and looks into none."""

from collections.abc import Sequence
from typing import Protocol

MEMORY = "memory"  # the nearest: the store itself, as reports call it
Buffer = bytes | bytearray | memoryview


class TierError(Exception):
    """A tier failed: it is full, gone, read-only or too slow. One line; whoever asked goes on without it."""


class Tier(Protocol):
    """Every method may be called from any thread, and may take as long as the tier does, except `contains`.

    `name`: as reports call it.
    """

    @property
    def name(self) -> str: ...

    def contains(self, block: str) -> bool | None:
        """Whether a record of that name is there, as far as is known without asking around; None: not known."""
        ...

    def probe(self, block: str) -> bool:
        """Whether a record of that name is there, asking around where that is needed. Raises `TierError`."""
        ...

    def get(self, block: str, size: int) -> Buffer | None:
        """The record of that name, of at most `size` + 1 bytes; None where there is none. Raises `TierError`."""
        ...

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        """Keep a record, given in pieces; before the time `until` (seconds of the epoch) others go first.

        False where the tier has no room for it. Once it returns the record survives a crash, where that is the tier's
        promise. Raises `TierError`.
        """
        ...

    def pin(self, blocks: Sequence[str], until: float) -> None:
        """These records, the first of a sequence first, are in use, and others go before them until `until`.
        Infinity: they stay until they are removed or pinned until less. Names that are not there are ignored."""
        ...

    def remove(self, block: str) -> None:
        """Forget a record, if there is one."""
        ...


class SharedTier(Tier, Protocol):
    """A tier that a URL names (`--cache-remote`). `place`: where it is, without what is secret in the URL; `budget`:
    what it may take, in words, as "1 GB"."""

    @property
    def place(self) -> str: ...

    @property
    def budget(self) -> str: ...

    def close(self) -> None:
        """Nothing is asked of it any more."""
        ...
