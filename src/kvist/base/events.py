"""What the cache did, as facts that others may watch: the trace, metrics, an inspector.

An event is emitted after the change it names has happened. Listeners read; they never change what they watch.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reserved:
    """`blocks` were taken for a lease so that `tokens` more fit; `copies` shared blocks became its own."""

    lease: int
    tokens: int
    blocks: int
    copies: int


@dataclass(frozen=True)
class Committed:
    """`tokens` more tokens of a lease are written; it now holds `length`."""

    lease: int
    tokens: int
    length: int


@dataclass(frozen=True)
class RolledBack:
    """A lease was cut to `length` tokens and gave back `blocks`."""

    lease: int
    length: int
    blocks: int


@dataclass(frozen=True)
class Released:
    """A lease ended and gave back all its `blocks`."""

    lease: int
    blocks: int


@dataclass(frozen=True)
class Adopted:
    """A lease found `tokens` more of its tokens in the prefix tree; it now holds `length`."""

    lease: int
    tokens: int
    length: int


@dataclass(frozen=True)
class Evicted:
    """The prefix tree forgot `block`, which nobody read any more."""

    block: int


CacheEvent = Adopted | Evicted | Reserved | Committed | RolledBack | Released
Listener = Callable[[CacheEvent], None]
