"""Why a prompt was computed again: what of it came from where, what differs from the nearest earlier request, and what
that cost."""

import time
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
    UNFINISHED,
    UNKNOWN,
    WHY,
    Difference,
    Explanation,
    Origin,
    Side,
)
from kvist.service.history import ALIKE, RUN, Asked, Grams, History, Ids, common
from kvist.service.places import first_difference, spot

_EXCERPT = 60  # characters on each side of a difference
_KEPT = 1024  # explanations
_AROUND = 4  # tokens before an answer, which may decide how its first one is written

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Asking:
    """A request under way, and the nearest one before it."""

    now: Asked
    nearest: Asked | None


class Explainer:
    """Remembers requests and explains them. For the event loop's thread. `decode` gives the text of token ids."""

    def __init__(self, decode: Decode, block_size: int) -> None:
        self.history = History()
        self._decode = decode
        self._block = block_size
        self._told: OrderedDict[tuple[str, str], Explanation] = OrderedDict()

    def asked(self, request: Request, origin: Origin) -> "Asking":
        """A request comes."""
        tokens = np.array(request.prompt, np.uint32)
        nearest = self.history.nearest(request.tenant, origin.session, tokens, request.namespace)
        text = self._decode(request.prompt) if origin.text is None else origin.text
        asked = Asked(
            "", request.tenant, origin.session, tokens, len(tokens), text, origin.parts, namespace=request.namespace
        )
        self.history.add(asked)
        return Asking(asked, nearest)

    def computed(self, asking: "Asking", sequence: Running) -> None:
        """All of its prompt has been."""
        asking.now.computed = sequence.times.first or time.perf_counter()

    def forget(self, asking: "Asking") -> None:
        """It ended before that: there is nothing to compare with, and nothing to say."""
        self.history.forget(asking.now)

    def answered(self, asking: "Asking", sequence: Running, ids: Sequence[str]) -> Explanation:
        """What there is to say now that a sequence of it has ended. Its tenant may ask for it under each of `ids`."""
        asking.now.answered(sequence.new_tokens)
        found = explain(asking.now, asking.nearest, sequence, self._decode, self._block)
        if found.nearest is not None and asking.nearest in self.history:
            asking.now.before = asking.nearest
        asking.now.explanation = found
        for id in ids:
            self._told[asking.now.tenant, id] = found
        while len(self._told) > _KEPT:
            self._told.popitem(last=False)
        return found

    def session(self, tenant: str, session: str | None) -> list[tuple[Asked, Explanation | None]]:
        """What is remembered of a session, the oldest request first, as `tax_of` takes it; without a name, of the one
        that the tenant's last request belongs to."""
        asked = self.history.of(tenant, session) if session is not None else self.history.thread(tenant)
        return [(one, one.explanation) for one in asked]

    def told(self, tenant: str, id: str) -> Explanation | None:
        """What a tenant may ask for; None for what is another's, and for what never was."""
        return self._told.get((tenant, id))


@dataclass(frozen=True)
class _Pair:
    """A request and an earlier one, which has its first `shared` tokens, too."""

    now: Asked
    earlier: Asked
    shared: int

    @property
    def prompt(self) -> Ids:
        return self.now.tokens[: self.now.prompt_tokens]

    @property
    def goes_on(self) -> bool:
        """Whether one of the prompts begins with the other."""
        # The last token of a prompt may be another when something follows: so the texts are asked.
        length = min(self.earlier.prompt_tokens, self.now.prompt_tokens)
        return self.shared >= length or self.now.text.startswith(self.earlier.text)

    def is_alike(self, block: int) -> bool:
        """Whether the two are versions of one prompt: only then is a difference between them worth telling."""
        if self.shared >= block or self.goes_on:
            return True
        rest = Grams(self.prompt[self.shared :]).found_in(self.earlier.tokens)
        return self.shared + int(rest.sum()) >= ALIKE * self.now.prompt_tokens

    def again(self, first: int) -> int | None:
        """How many tokens from the `first` on, but for the last, which is always computed, the earlier request had,
        too."""
        if not self.earlier.computed:
            return None
        start = max(first - RUN + 1, 0)  # a run may begin before what was computed
        return int(Grams(self.prompt[start:]).found_in(self.earlier.tokens)[first - start : -1].sum())

    def is_lost(self, cached: int, block: int) -> bool:
        """Whether a block or more of what both begin with was computed, though it is kept by whole blocks."""
        return cached + block < min(self.shared, len(self.prompt) - 1)

    @property
    def answer_came_back(self) -> bool:
        """Whether most of what the earlier answer has behind the first difference is in the prompt, so that it is that
        answer, without its reasoning say, and not another one."""
        rest = self.earlier.tokens[self.shared :]
        return 2 * int(Grams(rest).found_in(self.prompt[self.shared :]).sum()) > len(rest)

    @property
    def is_split_otherwise(self) -> bool:
        """Whether the earlier answer, whose text is the same, came back as other tokens. The last of an answer may have
        ended it, and need not come back."""
        came_back = len(self.now.text) > len(self.earlier.text) and self.now.text.startswith(self.earlier.text)
        return came_back and self.earlier.prompt_tokens <= self.shared < len(self.earlier.tokens) - 1


def explain(asked: Asked, nearest: Asked | None, sequence: Running, decode: Decode, block: int) -> Explanation:
    """Compare a request with the nearest one before it. `block`: tokens of a block of the cache."""
    prompt = asked.tokens[: asked.prompt_tokens]
    cached = min(sequence.cached.prompt, len(prompt))
    computed = len(prompt) - cached
    pair = None if nearest is None else _Pair(asked, nearest, common(nearest.tokens, prompt))
    if pair is not None and not pair.is_alike(block):
        pair = None
    # What is less than a block at the end of what both begin with was never kept, so nothing is paid again for it.
    again = None if pair is None else pair.again(cached if pair.is_lost(cached, block) else max(cached, pair.shared))
    difference = None if pair is None else _difference(pair, decode)
    reason = _reason(pair, sequence, cached, difference, block)
    times = sequence.times
    seconds = max(times.first - times.admitted, 0.0) if times.first else None
    return Explanation(
        id=asked.id,
        session=asked.session,
        prompt_tokens=len(prompt),
        cached={tier: count for tier, count in sequence.cached.tiers.items() if count > 0},
        computed=computed,
        reason=reason,
        why=WHY[reason],
        nearest=None if pair is None else pair.earlier.id,
        common=None if pair is None else pair.shared,
        again=again,
        again_seconds=None if again is None or seconds is None else seconds * again / max(computed, 1),
        difference=difference,
        note=_note(pair, sequence, difference, block),
    )


def _reason(pair: _Pair | None, sequence: Running, cached: int, difference: Difference | None, block: int) -> str:
    request = sequence.request
    if request.pooled or request.prompt_logprobs is not None:
        return NOT_LOOKED_UP
    if pair is None:
        return sequence.loss or (KEPT if cached >= block else NEW)
    # At least the last token is computed, and of what differs within a block perhaps the whole block.
    if pair.is_lost(cached, block):
        if sequence.loss is not None:
            return sequence.loss
        return UNKNOWN if 0 < pair.earlier.computed <= sequence.times.admitted else UNFINISHED
    if not pair.goes_on or (difference is not None and pair.answer_came_back):
        return CHANGED
    return CONTINUED


def _note(pair: _Pair | None, sequence: Running, difference: Difference | None, block: int) -> str | None:
    if len(sequence.request.prompt) <= block:
        return f"prompts of up to {block} tokens, one block, are hardly worth keeping"
    if sequence.resumes:
        return "it was put off for others, and part of it may have been computed more than once"
    if not sequence.request.kept:
        return "it was asked that this is kept in memory only"
    if pair is not None and difference is None and pair.is_split_otherwise:
        return "the earlier answer came back as other tokens of the same text, which were computed again"
    return None


def _difference(pair: _Pair, decode: Decode) -> Difference | None:
    """None where one of the two is the beginning of the other."""
    now, earlier, earlier_text = pair.now, pair.earlier, pair.earlier.text
    if now.text.startswith(earlier_text):  # behind its prompt came its answer
        if pair.shared >= len(earlier.tokens) - 1:
            return None
        earlier_text += _answer(earlier, decode)
    character = first_difference(now.text, earlier_text)
    if character >= min(len(now.text), len(earlier_text)):
        return None
    return Difference(
        pair.shared,
        character,
        _side(now, now.text, character, pair.shared, decode),
        _side(earlier, earlier_text, character, pair.shared, decode),
    )


def _answer(asked: Asked, decode: Decode) -> str:
    """The text of its answer. Some tokenizers write the first token of a text otherwise than within it."""
    start = asked.prompt_tokens
    before = decode(asked.tokens[max(start - _AROUND, 0) : start].tolist())
    whole = decode(asked.tokens[max(start - _AROUND, 0) :].tolist())
    return whole[len(before) :] if whole.startswith(before) else decode(asked.tokens[start:].tolist())


def _side(asked: Asked, text: str, character: int, token: int, decode: Decode) -> Side:
    if character >= len(asked.text):
        where, line, column = "its answer", None, None
    else:
        found = spot(asked.text, asked.places, character)
        where, line, column = found.label, found.line, found.column
    piece = decode(asked.tokens[token : token + 1].tolist()) if token < len(asked.tokens) else None
    before, after = text[max(0, character - _EXCERPT) : character], text[character : character + _EXCERPT]
    return Side(where, line, column, before, after, piece)
