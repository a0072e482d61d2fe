"""Why a prompt was computed again: what of it came from where, what differs from the nearest earlier request, and what
that cost."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvist.runtime.request import Request
from kvist.runtime.sequence import Sequence as Running
from kvist.service.explanation import (
    CHANGED,
    CONTINUED,
    KEPT,
    NEW,
    NOT_LOOKED_UP,
    UNKNOWN,
    WHY,
    Difference,
    Explanation,
    Origin,
    Side,
)
from kvist.service.history import Asked, Grams, History, common
from kvist.service.places import spot
from kvist.service.tax import Tax, tax_of

_EXCERPT = 60  # characters on each side of a difference
_KEPT = 1024  # explanations
_ALIKE = 0.25  # of a prompt that an earlier one must have for the two to be versions of one


@dataclass(frozen=True)
class Asking:
    """A request under way, and the nearest one before it."""

    now: Asked
    nearest: Asked | None


class Explainer:
    """Remembers requests and explains them. For the event loop's thread. `decode` gives the text of token ids."""

    def __init__(self, decode: Callable[[Sequence[int]], str], block_size: int) -> None:
        self.history = History()
        self._decode = decode
        self._block = block_size
        self._told: OrderedDict[tuple[str, str], Explanation] = OrderedDict()

    def asked(self, request: Request, origin: Origin) -> "Asking":
        """A request comes."""
        tokens = np.array(request.prompt, np.uint32)
        nearest = self.history.nearest(request.tenant, origin.session, tokens)
        text = self._decode(request.prompt) if origin.text is None else origin.text
        asked = Asked("", request.tenant, origin.session, tokens, len(tokens), text, origin.parts)
        self.history.add(asked)
        return Asking(asked, nearest)

    def answered(self, asking: "Asking", sequence: Running, ids: Sequence[str]) -> Explanation:
        """What there is to say now that a sequence of it has ended. Its tenant may ask for it under each of `ids`."""
        asking.now.answered(sequence.new_tokens)
        found = explain(asking.now, asking.nearest, sequence, self._decode, self._block)
        asking.now.before = None if found.nearest is None else asking.nearest
        asking.now.explanation = found
        for id in ids:
            self._told[asking.now.tenant, id] = found
        while len(self._told) > _KEPT:
            self._told.popitem(last=False)
        return found

    def tax(self, tenant: str, session: str | None, count: Callable[[str], int]) -> Tax | None:
        """What a session paid; without a name, the one that the tenant's last request belongs to. None when nothing of
        it is remembered. `count` gives the tokens of a text."""
        asked = self.history.of(tenant, session) if session is not None else self.history.thread(tenant)
        return tax_of([(one, one.explanation) for one in asked], count) if asked else None

    def told(self, tenant: str, id: str) -> Explanation | None:
        """What a tenant may ask for; None for what is another's, and for what never was."""
        return self._told.get((tenant, id))


def explain(
    asked: Asked, nearest: Asked | None, sequence: Running, decode: Callable[[Sequence[int]], str], block: int
) -> Explanation:
    """Compare a request with the nearest one before it. `block`: tokens of a block of the cache."""
    prompt = asked.tokens[: asked.prompt_tokens]
    cached = min(sequence.cached.prompt, len(prompt))
    computed = len(prompt) - cached
    shared = None if nearest is None else common(nearest.tokens, prompt)
    again = None if nearest is None else int(Grams(prompt).found_in(nearest.tokens)[cached:].sum())
    reason = _reason(asked, nearest, sequence, shared, block)
    times = sequence.times
    seconds = max(times.first - times.admitted, 0.0) if times.first else None
    alike = nearest is not None and reason not in (NEW, KEPT)
    cost = None if again is None or seconds is None or not computed else seconds * again / computed
    return Explanation(
        id=asked.id,
        session=asked.session,
        prompt_tokens=len(prompt),
        cached={tier: count for tier, count in sequence.cached.tiers.items() if count > 0},
        computed=computed,
        reason=reason,
        why=WHY[reason],
        nearest=nearest.id if nearest is not None and alike else None,
        common=shared if alike else None,
        again=again,
        again_seconds=cost if alike else None,
        difference=_difference(asked, nearest, shared, decode) if nearest is not None and alike else None,
        note=_note(sequence, len(prompt), block),
    )


def _reason(asked: Asked, nearest: Asked | None, sequence: Running, shared: int | None, block: int) -> str:
    request, prompt = sequence.request, asked.tokens[: asked.prompt_tokens]
    if request.pooled or request.prompt_logprobs is not None:
        return NOT_LOOKED_UP
    cached = min(sequence.cached.prompt, len(prompt))
    if nearest is None or shared is None:
        return (KEPT if cached else NEW) if sequence.loss is None else sequence.loss
    # At least the last token is computed, and of what differs within a block perhaps the whole block.
    if cached + block < min(shared, len(prompt) - 1):
        return UNKNOWN if sequence.loss is None else sequence.loss
    # The last token of a prompt may be another when something follows: so the texts are asked.
    if shared >= min(nearest.prompt_tokens, len(prompt)) or asked.text.startswith(nearest.text):
        return CONTINUED
    alike = shared + int(Grams(prompt[shared:]).found_in(nearest.tokens).sum())
    if alike < _ALIKE * len(prompt) and shared < block:
        return (KEPT if cached >= block else NEW) if sequence.loss is None else sequence.loss
    return CHANGED


def _note(sequence: Running, length: int, block: int) -> str | None:
    if length <= block:
        return f"prompts of up to {block} tokens, one block, are hardly worth keeping"
    if not sequence.request.kept:
        return "it was asked that this is kept in memory only"
    return None


def _difference(
    asked: Asked, nearest: Asked, shared: int | None, decode: Callable[[Sequence[int]], str]
) -> Difference | None:
    """None where one of the two texts is the beginning of the other."""
    assert shared is not None
    earlier_text = nearest.text
    if asked.text.startswith(nearest.text):  # behind its prompt came its answer
        earlier_text += decode(nearest.tokens[nearest.prompt_tokens :].tolist())
    character = first_difference(asked.text, earlier_text)
    if character >= min(len(asked.text), len(earlier_text)):
        return None
    return Difference(
        shared,
        character,
        _side(asked, asked.text, character, shared, decode),
        _side(nearest, earlier_text, character, shared, decode),
    )


def _side(asked: Asked, text: str, character: int, token: int, decode: Callable[[Sequence[int]], str]) -> Side:
    if character > len(asked.text):
        where, line, column = "its answer", None, None
    else:
        found = spot(asked.text, asked.places, character)
        where, line, column = found.label, found.line, found.column
    piece = decode(asked.tokens[token : token + 1].tolist()) if token < len(asked.tokens) else None
    before, after = text[max(0, character - _EXCERPT) : character], text[character : character + _EXCERPT]
    return Side(where, line, column, before, after, piece)


def first_difference(a: str, b: str) -> int:
    """Index of the first character that is not the same: the length of the shorter text where there is none."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
