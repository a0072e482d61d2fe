"""What a session pays, in figures that are added up here once more; and what is remembered of it."""

import numpy as np

from kvist.cache.record import Loss
from kvist.service.explanation import CHANGED, CONTINUED, NEW, Difference, Explanation, Side
from kvist.service.history import Asked, History
from kvist.service.places import Place
from kvist.service.tax import MOST_PARTS, tax_of


def asked(tokens: list[int], text: str = "", places: tuple[Place, ...] = ()) -> Asked:
    return Asked("id", "", "mine", np.array(tokens, np.uint32), len(tokens), text, lambda: places)


def explained(
    prompt: int,
    computed: int,
    reason: str = CONTINUED,
    common: int | None = None,
    again: int | None = None,
    where: str | None = None,
) -> Explanation:
    difference = None
    if where is not None:
        side = Side(where, 1, 1, "", "", None)
        difference = Difference(0, 0, side, side)
    seconds = None if again is None else again / 100
    cached = {"memory": prompt - computed}
    return Explanation("id", "mine", prompt, cached, computed, reason, "", None, common, again, seconds, difference)


def test_what_was_computed_what_was_necessary_and_what_was_paid_again() -> None:
    same, other = list(range(100)), [*range(60), *range(500, 600)]
    tax = tax_of(
        [
            (asked(same), explained(100, 100, NEW)),
            (asked(same), explained(100, 1, common=100, again=1)),
            (asked(same), explained(100, 80, Loss.EVICTED, common=100, again=79)),
            (asked(other), explained(160, 100, CHANGED, common=60, again=40, where="the system message")),
            (asked(other), explained(160, 110, CHANGED, common=60, again=50, where="the system message")),
            (asked([*same, 7]), None),  # under way
        ],
        len,
    )
    assert (tax.requests, tax.prompt_tokens) == (6, 100 * 3 + 160 * 2 + 101)
    assert (tax.computed, tax.cached) == (391, 620 - 391)
    assert tax.necessary == 100 + 1 + 1 + 100 + 100
    assert tax.again == 1 + 79 + 40 + 50
    assert (tax.stable, tax.changing) == (60, 101 - 60)
    # What only went on has broken nothing, though its last token was computed again.
    assert [(one.what, one.times, one.again) for one in tax.breaks] == [
        ("changed: the system message, line 1", 2, 90),
        ("evicted", 1, 79),
    ]


def test_of_many_parts_the_longest_are_told_in_their_order() -> None:
    places, text = [], ""
    for number in range(MOST_PARTS + 20):
        start = len(text)
        text += "x" * (3 if number < 20 else 5 + number % 7)
        places.append(Place(f"message {number}", start, len(text)))
    tax = tax_of([(asked([1], text, tuple(places)), None)], len)
    assert [part.label for part in tax.parts] == [f"message {number}" for number in range(20, MOST_PARTS + 20)]
    assert [part.tokens for part in tax.parts] == [5 + number % 7 for number in range(20, MOST_PARTS + 20)]


def test_what_is_forgotten_is_followed_no_further() -> None:
    history, thread = History(), [asked([number] * 20) for number in range(3)]
    for before, after in zip([None, *thread], thread, strict=False):
        after.before = before
        history.add(after)
    assert history.thread("") == thread
    history.forget(thread[0])
    assert thread[0] not in history
    assert history.thread("") == thread[1:]
    history.forget(thread[0])
    assert len(history) == 2
