"""Why a prompt was computed again, as it is told: facts and words."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kvist.cache.record import Loss
from kvist.service.places import Place

NEW, KEPT, CONTINUED, CHANGED = "new", "kept", "continued", "changed"
UNFINISHED, UNKNOWN, NOT_LOOKED_UP = "unfinished", "unknown", "not looked up"

WHY = {
    NEW: "no earlier request of yours that is remembered begins alike",
    KEPT: "its beginning was there: of a request that came later or is not remembered, a context or a public prompt",
    CONTINUED: "it goes on where an earlier request ended; only what is new was computed",
    CHANGED: "the text is another from here on",
    UNFINISHED: "the earlier request that begins alike had not been computed yet",
    UNKNOWN: "blocks that an earlier request computed were not found, and it is not known why",
    NOT_LOOKED_UP: "nothing is read from the cache where log-probabilities of the prompt, or embeddings, are asked for",
    Loss.EVICTED: "the room was needed for others",
    Loss.EXPIRED: "it was not used for longer than the server keeps it",
    Loss.TRUNCATED: "its file was cut short",
    Loss.CORRUPT: "its file was damaged",
    Loss.VERSION: "it was written by another version of Kvist",
    Loss.FOREIGN: "its file held something else",
    Loss.UNREADABLE: "the disk, or the remote store, failed or took too long",
    Loss.UNWRITTEN: "it was given up before it could be written",
    Loss.NAMESPACE: "it was made by other weights, codecs or operators",
    Loss.UNKEPT: "its request asked that it is not kept beyond memory",
}


@dataclass(frozen=True)
class Origin:
    """What is known of where a prompt's tokens came from. `session`: the client's name for what belongs together."""

    text: str | None = None
    parts: Callable[[], tuple[Place, ...]] = tuple
    session: str | None = None


NOWHERE = Origin()


@dataclass(frozen=True)
class Side:
    """One of the two texts at the difference: `before`, `after` are short excerpts; `token`: what the first token that
    differs spells, None at the end."""

    where: str
    line: int | None
    column: int | None
    before: str
    after: str
    token: str | None


@dataclass(frozen=True)
class Difference:
    """The first one. `token`: index of the first token that is not the same; `character`: of the first character."""

    token: int
    character: int
    now: Side
    earlier: Side


@dataclass(frozen=True)
class Explanation:
    """See `to_json`, which docs/json.md documents. `nearest`: id of the earlier request that it is compared with, which
    has the first `common` tokens, too; `again`: computed tokens that it also had; `again_seconds`: what these took."""

    id: str
    session: str | None
    prompt_tokens: int
    cached: dict[str, int]
    computed: int
    reason: str
    why: str
    nearest: str | None
    common: int | None
    again: int | None
    again_seconds: float | None
    difference: Difference | None
    note: str | None = None

    @property
    def where(self) -> str | None:
        """Where the prompt begins to differ, in a few words."""
        if self.difference is None:
            return None
        now = self.difference.now
        return now.where if now.line is None else f"{now.where}, line {now.line}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"where": self.where}

    def short(self) -> Any:
        """What every answer carries."""
        return {
            "cached": self.cached,
            "computed": self.computed,
            "reason": self.reason,
            "where": self.where,
            "again": self.again,
            "again_seconds": self.again_seconds,
        }
