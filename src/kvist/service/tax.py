"""What a session pays for its prompts: what stays, what changes, what each part costs, what breaks the cache."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvist.service.explanation import CONTINUED, Explanation
from kvist.service.history import Asked, common

MOST_PARTS = 64  # the longest ones


@dataclass(frozen=True)
class Part:
    """A part of the session's last prompt, and about how many tokens it takes."""

    label: str
    tokens: int


@dataclass(frozen=True)
class Break:
    """Where prompts began to differ, or what was lost: how often, and tokens and seconds paid again for it."""

    what: str
    times: int
    again: int
    seconds: float


@dataclass(frozen=True)
class Tax:
    """`stable`: first tokens that all prompts share; `changing`: those behind them, of the median prompt. `cached` and
    `computed` tokens add up to those of the prompts that were answered; `again` of the computed an earlier request had,
    too. `necessary`: what would have been computed had nothing been lost: what no earlier request began with."""

    session: str | None
    requests: int
    prompt_tokens: int
    cached: int
    computed: int
    necessary: int
    again: int
    again_seconds: float
    stable: int
    changing: int
    parts: tuple[Part, ...]
    breaks: tuple[Break, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tax_of(requests: Sequence[tuple[Asked, Explanation | None]], count: Callable[[str], int]) -> Tax:
    """Of the requests of one session, at least one, the oldest first, with the explanations of those that have ended.
    `count` gives the tokens of a text."""
    asked = [one for one, _ in requests]
    explained = [found for _, found in requests if found is not None]
    stable = min((common(one.tokens[: one.prompt_tokens], asked[0].tokens) for one in asked), default=0)
    lengths = sorted(one.prompt_tokens for one in asked)
    last = asked[-1]
    longest = sorted(last.places, key=lambda place: place.start - place.end)[:MOST_PARTS]
    shown = sorted(longest, key=lambda place: place.start)
    parts = [Part(place.label, count(last.text[place.start : place.end])) for place in shown]
    broken: dict[str, list[Explanation]] = defaultdict(list)
    for found in explained:
        if found.again and found.reason != CONTINUED:
            what = f"{found.reason}: {found.where}" if found.where else found.reason
            broken[what].append(found)
    breaks = [
        Break(what, len(found), sum(one.again or 0 for one in found), sum(one.again_seconds or 0.0 for one in found))
        for what, found in broken.items()
    ]
    totals: Counter[str] = Counter()
    for found in explained:
        totals["cached"] += found.prompt_tokens - found.computed
        totals["computed"] += found.computed
        totals["necessary"] += min(found.computed, found.prompt_tokens - (found.common or 0)) or 1
        totals["again"] += found.again or 0
    return Tax(
        session=last.session,
        requests=len(asked),
        prompt_tokens=sum(lengths),
        cached=totals["cached"],
        computed=totals["computed"],
        necessary=totals["necessary"],
        again=totals["again"],
        again_seconds=sum(found.again_seconds or 0.0 for found in explained),
        stable=stable,
        changing=lengths[len(lengths) // 2] - stable,
        parts=tuple(parts),
        breaks=tuple(sorted(breaks, key=lambda found: (-found.again, -found.times))),
    )
