"""The state of one request on its way through the engine."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from kvist.base.errors import KvistError
from kvist.cache.kept import Fetch
from kvist.cache.manager import Lease
from kvist.cache.record import Loss
from kvist.runtime.request import FinishReason, Request, TokenLogprobs
from kvist.runtime.sampler import Sampler


@dataclass
class Times:
    """When what happened to a sequence, in seconds of `time.perf_counter`; 0 while it has not."""

    added: float = 0.0
    admitted: float = 0.0  # for the first time
    first: float = 0.0  # token drawn
    last: float = 0.0  # token drawn


@dataclass
class Cached:
    """How many tokens a sequence did not compute, by why they were looked for; `tiers`, `resume_tiers`: those of the
    prompt, and those of when it came back, by where they were."""

    prompt: int = 0  # when it was first admitted, or while its prompt was computed: shared with another request
    fork: int = 0  # its prompt was computed for another choice of the same request
    resume: int = 0  # when it came back after a preemption
    tiers: Counter[str] = field(default_factory=Counter)
    resume_tiers: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Sequence:
    """One request on its way. The engine and its scheduler alone change it.

    `tokens`: the prompt and all that was drawn. `lease.length` of them are in the cache; the rest is still to be
    computed, and only when none is left is the next token drawn.

    `twins`: other choices of the same prompt, which wait for this one, their `leader`, to compute it.
    """

    request: Request
    number: int  # in the order of arrival
    sampler: Sampler
    tokens: list[int] = field(init=False)
    lease: Lease | None = None
    finish_reason: FinishReason | None = None
    error: KvistError | None = None  # why it failed
    leader: "Sequence | None" = None
    twins: list["Sequence"] = field(default_factory=list)
    kv_blocks: int = 0  # blocks held when it ended
    preempted: int = 0  # how many times
    last_step: int = 0  # in which it computed something
    cached: Cached = field(default_factory=Cached)
    times: Times = field(default_factory=Times)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens from the second on
    fetch: Fetch | None = None  # while blocks of it are read from the kept cache
    turn: float = 0.0  # tokens computed for its tenant when it was last admitted
    begun: float = 0.0  # when it last got a lease, in seconds of the epoch
    loss: Loss | None = None  # why the first block of its prompt that was not found is gone, where it was there once
    pooled: Tensor | None = None  # [hidden_size] float64: the sum of the hidden states, where they were asked for

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def new_tokens(self) -> list[int]:
        """What was drawn so far."""
        return self.tokens[len(self.request.prompt) :]

    def count_cached(self, tokens: int, tier: str) -> None:
        """`tokens` of it were found in `tier`."""
        if self.resumes:
            self.cached.resume += tokens
            self.cached.resume_tiers[tier] += tokens
        else:
            self.cached.prompt += tokens
            self.cached.tiers[tier] += tokens

    def note_loss(self, loss: Loss | None) -> None:
        """A block was looked for and not found. What it loses of its own, put off, is no loss of the prompt's."""
        if not self.resumes:
            self.loss = loss

    @property
    def resumes(self) -> bool:
        """Whether it was put off after it had computed something."""
        return self.preempted > 0 and self.last_step > 0

    @property
    def most_tokens(self) -> int:
        """The most tokens it may come to keep in the cache: the last one drawn is never written."""
        return len(self.request.prompt) + max(self.request.max_tokens - 1, 0)

    @property
    def pending(self) -> int:
        """How many of its tokens are not in the cache."""
        return len(self.tokens) - (self.lease.length if self.lease is not None else 0)

    @property
    def reusable(self) -> int:
        """How many of its first tokens may be read from the cache: what is still to be seen must be computed."""
        request = self.request
        if request.pooled:
            return 0
        if request.prompt_logprobs is not None and len(self.prompt_logprobs) < len(request.prompt) - 1:
            return len(self.prompt_logprobs)
        return len(self.tokens) - 1
