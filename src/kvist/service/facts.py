"""What the engine's thread did, as facts for whoever counts: metrics, a log. And its state, for whoever asks.

A fact is emitted after what it names has happened, on the engine's thread, `Explained` on the event loop's. A listener
is quick, is safe on both, and changes nothing of what it watches. Times are of one monotonic clock, in seconds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvist.runtime.request import FinishReason


class Cause(StrEnum):
    """Why tokens of a sequence were looked for in the cache."""

    PROMPT = "prompt"  # the prompt of a new request; found is what it shares with an earlier or a running one
    RESUME = "resume"  # a sequence that was preempted comes back; found is what was left of its own
    FORK = "fork"  # a further choice of the same request, which shares the prompt with the first


@dataclass(frozen=True, slots=True)
class Matched:
    """`tokens` of a sequence were looked for in the cache, and `cached` of them were not computed."""

    cause: Cause
    tokens: int
    cached: int
    tiers: Mapping[str, int] = field(default_factory=dict)  # of those cached, by where they were


@dataclass(frozen=True, slots=True)
class StepDone:
    """One step ran: `tokens` of `sequences` were computed in `seconds`, and `preempted` sequences had to make room.

    `drawn`: new tokens, of all choices. `first`: for each choice whose first token this step drew, seconds since it was
    submitted. `gaps`: for each other choice that drew, seconds since it last did.
    """

    tokens: int
    sequences: int
    seconds: float
    drawn: int
    preempted: int = 0
    first: tuple[float, ...] = ()
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceDone:
    """How one choice ended."""

    new_tokens: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class RequestDone:
    """All choices of a request have ended. `admitted`: when its first choice was; `first_token`: when any choice drew
    its first. None where it did not come to that."""

    prompt_tokens: int
    choices: tuple[ChoiceDone, ...]
    submitted: float
    admitted: float | None
    first_token: float | None
    ended: float


@dataclass(frozen=True, slots=True)
class Explained:
    """Of a prompt `computed` tokens were, for this `reason`; `again` of them an earlier request had, too."""

    reason: str
    computed: int
    again: int


Fact = Matched | StepDone | RequestDone | Explained
FactListener = Callable[[Fact], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What is under way at this moment. Blocks: of all `kv_blocks`, those that live sequences hold (`kv_blocks_used`)
    and those that only the prefix tree keeps (`kv_blocks_cached`), which are given up when room is needed."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks: int
