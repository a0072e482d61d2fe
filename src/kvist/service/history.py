"""What was asked lately, so that it can be said what is different now. Of each tenant, and for no other."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvist.service.explanation import Explanation
from kvist.service.places import Place

MOST = 256  # requests
MOST_BYTES = 64 << 20
ALIKE = 0.25  # of a prompt that an earlier one must have for the two to be versions of one
RUN = 8  # tokens in a row that have to be the same
_PRIME = 1_000_003
_CANDIDATES = 3
_SAMPLED = 4096  # tokens from which on a part of the runs tells who is alike
_SHIFT = np.uint64(60)  # one of sixteen runs is in the sample
_MIX = np.uint64(0x9E3779B97F4A7C15)

Ids = NDArray[np.uint32]


@dataclass(eq=False)
class Asked:
    """One request. `tokens`: of its prompt, and of its answer once that is known; `prompt_tokens` of them are the
    prompt's. `text`: of the prompt. `parts` finds the places of the text, when it is asked. `before`: the request that
    it goes on from, or changes, while that is remembered. `computed`: when its prompt had been, in seconds of
    `time.perf_counter`; 0 until then."""

    id: str
    tenant: str
    session: str | None
    tokens: Ids
    prompt_tokens: int
    text: str
    parts: Callable[[], tuple[Place, ...]]
    before: "Asked | None" = None
    computed: float = 0.0
    explanation: Explanation | None = None  # once it has ended
    namespace: str = ""  # nothing is shared with requests of another

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The parts of the prompt."""
        return self.parts()

    def answered(self, tokens: Sequence[int]) -> None:
        """What it was answered."""
        self.tokens = np.concatenate([self.tokens[: self.prompt_tokens], np.array(tokens, np.uint32)])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""
        return self.tokens.nbytes + 8 * len(self.text)  # the request's own texts, too


class History:
    """The last requests, at most `most` of them and about `most_bytes` bytes. For one thread."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._asked: OrderedDict[Asked, None] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._asked)

    def __contains__(self, asked: object) -> bool:
        return asked in self._asked

    def add(self, asked: Asked) -> None:
        """Remember one more, and forget the oldest for it where there are too many."""
        self._asked[asked] = None
        total = sum(one.nbytes for one in self._asked)
        while len(self._asked) > self._most or (total > self._most_bytes and len(self._asked) > 1):
            oldest = next(iter(self._asked))
            total -= oldest.nbytes
            self.forget(oldest)

    def forget(self, asked: Asked) -> None:
        """Be it there or not."""
        self._asked.pop(asked, None)
        for one in self._asked:
            if one.before is asked:
                one.before = None

    def thread(self, tenant: str) -> list[Asked]:
        """The last request of a tenant and those that it grew from, the oldest first."""
        found = self.of(tenant)[-1:]
        while found and found[0].before is not None:
            found.insert(0, found[0].before)
        return found

    def of(self, tenant: str, session: str | None = None) -> list[Asked]:
        """Those of a tenant, and of a session where one is named, the oldest first."""
        return [one for one in self._asked if one.tenant == tenant and session in (None, one.session)]

    def nearest(self, tenant: str, session: str | None, tokens: Ids, namespace: str = "") -> Asked | None:
        """The earlier request of a namespace that has the most of these tokens; of several the latest. One of the same
        session, if that has a quarter of them."""
        own = [one for one in self.of(tenant) if one.namespace == namespace]
        if session is not None:
            found, share = _most_alike([one for one in own if one.session == session], tokens)
            if share >= ALIKE:
                return found
        return _most_alike(own, tokens)[0]


def _most_alike(asked: Sequence[Asked], tokens: Ids) -> tuple[Asked | None, float]:
    """Which of these requests, the oldest first, has the most of the tokens, and about what share of them."""
    latest = asked[::-1]
    firsts = {one: common(one.tokens, tokens) for one in latest}
    ordered = sorted(latest, key=firsts.__getitem__, reverse=True)
    if ordered and 2 * firsts[ordered[0]] >= len(tokens):
        return ordered[0], firsts[ordered[0]] / len(tokens)  # whatever the others have further on, they part earlier
    candidates = list(dict.fromkeys([*ordered[:_CANDIDATES], *latest[:_CANDIDATES]]))
    runs = _sample(tokens)
    best, most = None, 0.0
    for one in candidates:
        # The first tokens count twice: of two that have as much of it, the one that parts later.
        share = float(np.isin(runs, _sample(one.tokens, len(tokens))).mean()) if len(runs) else 0.0
        score = firsts[one] / len(tokens) + share
        if score > most:
            best, most = one, score
    return best, min(most, 1.0)


def common(a: Ids, b: Ids) -> int:
    """How many first tokens are the same."""
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


class Grams:
    """The runs of eight tokens of a sequence."""

    def __init__(self, tokens: Ids) -> None:
        self._count = len(tokens)
        self._hashes = _hashes(tokens)

    def found_in(self, other: Ids) -> NDArray[np.bool_]:
        """Which tokens are part of a run that the other sequence has, too, anywhere."""
        found = np.zeros(self._count, bool)
        same = np.isin(self._hashes, _hashes(other))
        for shift in range(RUN if len(same) else 0):
            found[shift : shift + len(same)] |= same
        return found


def _sample(tokens: Ids, like: int | None = None) -> NDArray[np.uint64]:
    """The runs of a sequence; of a long one (`like`: as long as another one) a part that depends on the runs alone."""
    hashes = _hashes(tokens)
    return hashes if (like or len(tokens)) < _SAMPLED else hashes[(hashes * _MIX) >> _SHIFT == 0]


def _hashes(tokens: Ids) -> NDArray[np.uint64]:
    count = len(tokens) - RUN + 1
    total = np.zeros(max(count, 0), np.uint64)
    for shift in range(RUN if count > 0 else 0):
        total = total * np.uint64(_PRIME) + tokens[shift : shift + count].astype(np.uint64)
    return total
