"""What is asked of the engine, and the state of one sequence that answers it."""

from dataclasses import dataclass, field
from enum import StrEnum

from kvist.base.errors import RequestError
from kvist.cache.manager import Lease


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token or a stop string
    LENGTH = "length"  # as many tokens as were asked for, or as the context holds
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; filters apply in the order top-k, top-p, min-p.

    `top_k` 0 keeps all; `top_p` keeps the smallest set of tokens whose probability reaches it (arXiv 1904.09751);
    `min_p` drops tokens less likely than that fraction of the likeliest (arXiv 2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature must be between 0 (greedy) and 100, got {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top-k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min-p must be between 0 and 1, got {self.min_p}")
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"a seed is a number from 0 to 2^64 - 1, got {self.seed}")


@dataclass(frozen=True)
class Request:
    """A prompt in token ids, and how to continue it."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: a model continues text, so give it at least one token")
        if self.max_tokens < 1:
            raise RequestError(f"at least one new token must be asked for, got {self.max_tokens}")


@dataclass(eq=False)
class Sequence:
    """One request on its way. The engine alone changes it.

    `tokens`: the prompt and all that was drawn. `lease.length` of them are in the cache; the rest is still to be
    computed, and only when none is left is the next token drawn.
    """

    request: Request
    tokens: list[int] = field(init=False)
    lease: Lease | None = None
    finish_reason: FinishReason | None = None
    kv_blocks: int = 0  # blocks held when it ended

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """What was drawn so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def most_tokens(self) -> int:
        """The most tokens it may come to keep in the cache: the last one drawn is never written."""
        return len(self.request.prompt) + self.request.max_tokens - 1
