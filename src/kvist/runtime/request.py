"""What is asked of the engine. Frozen: nothing here changes while it is answered."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from kvist.base.errors import RequestError

ADAPTER, IMPORTED = "\0adapter\0", "\0imported\0"  # parts of the names of namespaces, which no tenant's has


def namespace_of(tenant: str, adapter: str = "", imported: str = "") -> str:
    """Within which cached tokens are shared: a tenant's own, and those of each adapter, and behind each context that
    was imported and is not known to be right, apart. `imported`: digest of that context's file."""
    own = f"{tenant}{ADAPTER}{adapter}" if adapter else tenant
    return f"{own}{IMPORTED}{imported}" if imported else own


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token, a stop string, or a grammar that allows no more
    LENGTH = "length"  # as many tokens as were asked for, or as the context holds
    CANCELLED = "cancelled"
    FAILED = "failed"  # see the sequence's `error`


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; filters apply in the order top-k, top-p, min-p.

    `top_k` 0 keeps all; `top_p` keeps the smallest set of tokens whose probability reaches it (arXiv 1904.09751);
    `min_p` drops tokens less likely than that fraction of the likeliest (arXiv 2407.01082).

    Before temperature and filters, logits are changed in this order: `repetition_penalty` divides positive logits (and
    multiplies negative ones) of every token of the prompt or the answer (arXiv 1909.05858); `presence_penalty` and
    `frequency_penalty` are taken off the logits of tokens of the answer, once and per occurrence; `logit_bias` is added
    to the tokens it names.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

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
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise RequestError(f"{name} must be between -2 and 2, got {getattr(self, name)}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise RequestError(f"repetition_penalty must be between 0.01 and 100, got {self.repetition_penalty}")
        if not all(-100 <= bias <= 100 for _, bias in self.logit_bias):
            raise RequestError("a logit bias must be between -100 and 100")


class Grammar(Protocol):
    """Which tokens one sequence may still draw. It has state: each sequence has its own."""

    def forbid(self, logits: Tensor) -> None:
        """Set to -inf, in place, the logits `[V]` float32 of all tokens that may not come next."""
        ...

    def accept(self, token: int) -> None:
        """Take note of a token that was drawn."""
        ...

    @property
    def ended(self) -> bool:
        """Whether nothing may follow any more, not even an end-of-text token."""
        ...


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities that the model itself gives, before any of `Sampling`.

    `logprob`: of the token that came; `top`: the likeliest tokens and theirs, the likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """A prompt in token ids, and how to continue it.

    `logprobs`, `prompt_logprobs`: of how many of the likeliest tokens the log-probabilities are wanted beside each new
    token's, and beside each token's of the prompt; None: none at all. `max_tokens` 0: only the prompt is computed.
    `grammar` makes a sequence's own grammar. `priority`: lower comes first. `tenant`: whose it is; room is shared
    fairly between tenants, and cached tokens only within one. `pooled`: the sum of the prompt's last hidden states is
    wanted. `kept`: what is computed for it may be written to the tiers behind the memory; there others go first for
    `ttl` seconds since it was last used. `durable`: whoever asks wants all of it in the tiers: what memory has and they
    lack is written, too, and goes after all that is held for a time.
    `adapter`: the id of the one that its rows have, if any. `imported`: of the context that it begins with, see
    `namespace_of`. `min_tokens`: before so many are drawn, none of `stop_ids` is, unless a grammar allows nothing else.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Callable[[], Grammar] | None = None
    priority: int = 0
    tenant: str = ""
    pooled: bool = False
    kept: bool = True
    ttl: float = 0.0
    durable: bool = False
    adapter: str = ""
    imported: str = ""
    min_tokens: int = 0

    @property
    def namespace(self) -> str:
        """Cached tokens are shared within it only."""
        return namespace_of(self.tenant, self.adapter, self.imported)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: a model continues text, so give it at least one token")
        if self.max_tokens < 0 or (self.max_tokens == 0 and self.prompt_logprobs is None and not self.pooled):
            raise RequestError(f"at least one new token must be asked for, got {self.max_tokens}")
        if self.min_tokens < 0:
            raise RequestError(f"min_tokens must be 0 or more, got {self.min_tokens}")
