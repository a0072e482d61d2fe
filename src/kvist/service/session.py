"""What a client of the engine's thread asks for, and the stream that answers it. No HTTP, no wire format."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvist.base.errors import KvistError
from kvist.runtime.request import FinishReason, Request, TokenLogprobs
from kvist.runtime.sequence import Times
from kvist.service.explanation import NOWHERE, Explanation, Origin


@dataclass(frozen=True)
class Job:
    """A request and what its text needs.

    `choices`: how many answers; choice `i` draws with the seed of the request + `i` (modulo 2^64), and all share the
    prompt's blocks. `stops`: stop strings. `keep_special`: special tokens (but for those that end a text) give their
    text, as whoever parses tool calls needs it. `origin`: what the prompt's tokens were made of, for explanations.
    `progress`: how far the prompt is computed is told after each step, until its first token is drawn. `warnings`: what
    the client should know of how its request was understood.
    """

    request: Request
    choices: int = 1
    stops: tuple[str, ...] = ()
    keep_special: bool = False
    origin: Origin = NOWHERE
    progress: bool = False
    warnings: tuple[str, ...] = ()
    streamed: bool = True


@dataclass(frozen=True)
class NewToken:
    """One drawn token; `logprobs` where they were asked for."""

    id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class PrefillProgress:
    """How far a prompt is computed, in tokens: `processed` of `total`, of which `cached` were read from the cache.
    `seconds`: since it was begun."""

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(frozen=True)
class Delta:
    """What one step added to one choice. `text` is settled: all pieces joined are the whole. The last delta of a choice
    has `finish_reason`, with `stop` where a stop string ended it, and `error` where it was ended by a failure. One with
    `progress` adds nothing."""

    choice: int
    text: str
    tokens: tuple[NewToken, ...]
    finish_reason: FinishReason | None = None
    stop: str | None = None
    error: KvistError | None = None
    progress: PrefillProgress | None = None


class Session(Protocol):
    """One job under way. Iterate once over its deltas, of all choices as they come; it ends when all have ended.

    `cached_tokens`: how many of the prompt's tokens were read from the cache, `cached`: from which tier how many; known
    from the first delta on. `times`: of the first choice, complete from its last delta on.
    `prompt_logprobs`: one entry for each token of the prompt, None for the first; complete from the first delta on.
    `explanation`: of what was computed, known from the last delta on; None where there is nothing to explain.
    """

    job: Job
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int  # of all choices, so far
    warnings: tuple[str, ...]  # see `Job`
    prompt_logprobs: list[TokenLogprobs | None]
    explanation: Explanation | None

    @property
    def cached(self) -> Mapping[str, int]: ...

    @property
    def times(self) -> Times: ...

    def name(self, *ids: str) -> None:
        """What clients call the answer: they may ask for its explanation under each of these."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def cancel(self) -> None:
        """End every choice that has not ended, at any moment, any number of times."""
        ...
