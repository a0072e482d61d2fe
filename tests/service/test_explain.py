"""Two hundred edits of long prompts, each of which is found where it was made; and who may know of it."""

import json
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from kvist.cache.record import Loss
from kvist.runtime.request import Request
from kvist.runtime.sampler import Sampler
from kvist.runtime.sequence import Sequence
from kvist.service.explain import Explainer
from kvist.service.explanation import CHANGED, CONTINUED, KEPT, NEW, UNKNOWN, Explanation, Origin
from kvist.service.history import Asked, Grams, History, common
from kvist.service.places import find_places, first_difference
from kvist.text.chat import ChatTemplate
from tiny_model import TEMPLATE

BLOCK = 64
WORDS = (
    "The river carried the small boat past seven quiet villages before dawn while somebody on the bank counted "
    "lanterns aloud and wrote each number into a wet notebook that nobody would ever read again"
).split()
# A template that cuts what it is given, so that marks around a part do not come back as they went in.
CUTTING = TEMPLATE.replace("{{ message.content }}", "{{ message.content | trim | replace('>', '&gt;') }}")


@dataclass(frozen=True)
class Prompt:
    """A conversation. The system message comes first."""

    system: str
    tools: tuple[Mapping[str, Any], ...]
    messages: tuple[tuple[str, str], ...] = field(default=())

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [{"role": role, "content": text} for role, text in (("system", self.system), *self.messages)]

    def pieces(self) -> list[tuple[str | None, str]]:
        """What the template writes, written once more: each text with the part that it is, or None."""
        found: list[tuple[str | None, str]] = [(None, "<|im_start|>system\n"), ("the system message", self.system)]
        found.append((None, "\n\nFunctions:\n"))
        for tool in self.tools:
            found += [(f"tool {tool['function']['name']!r}", json.dumps(tool)), (None, "\n")]
        found.append(
            (None, 'To call one, write <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n')
        )
        for number, (role, text) in enumerate(self.messages, 2):
            found += [(None, f"<|im_start|>{role}\n"), (f"message {number} ({role})", text), (None, "<|im_end|>\n")]
        return [*found, (None, "<|im_start|>assistant\n")]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def draw(rng: random.Random) -> Prompt:
    lines = [sentence(rng, rng.randint(4, 14)) for _ in range(40)]
    lines[rng.randrange(6)] = "Today is 2026-03-14."
    tools = []
    for number in range(8):
        parameters = {"type": "object", "properties": {word: {"type": "string"} for word in rng.sample(WORDS, 4)}}
        function = {"name": f"tool_{number}", "description": sentence(rng, 12), "parameters": parameters}
        tools.append({"type": "function", "function": function})
    messages = []
    for number in range(9):
        text = "\n".join(sentence(rng, rng.randint(3, 30)) for _ in range(rng.randint(1, 6)))
        messages.append((("user", "assistant")[number % 2], text))
    place = rng.randrange(0, 9, 2)
    role, text = messages[place]
    messages[place] = role, f"{text}\n<reminder>{sentence(rng, 6)}</reminder>"
    return Prompt("\n".join(lines), tuple(tools), tuple(messages))


def edit(rng: random.Random, prompt: Prompt, kind: str) -> Prompt:
    messages, tools = list(prompt.messages), list(prompt.tools)
    if kind == "date":
        return replace(
            prompt, system=prompt.system.replace("2026-03-14", f"2026-0{rng.randint(4, 9)}-0{rng.randint(1, 9)}")
        )
    if kind == "reminder":
        place = next(i for i, (_, text) in enumerate(messages) if "<reminder>" in text)
        text, _, reminder = messages[place][1].partition("\n<reminder>")
        messages[place] = messages[place][0], text
        other = rng.choice([i for i in range(0, 9, 2) if i != place])
        messages[other] = messages[other][0], f"{messages[other][1]}\n<reminder>{reminder}"
    elif kind == "tool":
        place = rng.randrange(len(tools))
        tools[place] = {
            **tools[place],
            "function": {**tools[place]["function"], "name": f"renamed_{rng.randint(0, 9)}"},
        }
    elif kind == "order":
        place = rng.randrange(len(tools) - 1)
        tools[place], tools[place + 1] = tools[place + 1], tools[place]
    elif kind == "dropped":
        del messages[rng.randrange(len(messages) - 1)]
    else:  # a character anywhere: in the system message, a tool's description, or a message
        where = rng.randrange(3)
        if where == 0:
            return replace(prompt, system=mistyped(rng, prompt.system))
        if where == 1:
            place = rng.randrange(len(tools))
            function = tools[place]["function"]
            function = {**function, "description": mistyped(rng, function["description"])}
            tools[place] = {**tools[place], "function": function}
        else:
            place = rng.randrange(len(messages))
            messages[place] = messages[place][0], mistyped(rng, messages[place][1])
    return replace(prompt, tools=tuple(tools), messages=tuple(messages))


def mistyped(rng: random.Random, text: str) -> str:
    place = rng.choice([i for i, character in enumerate(text) if character.isalpha()])
    change = rng.choice(["#", "", text[place] + "#"])
    return text[:place] + change + text[place + 1 :]


def first_change(earlier: Prompt, now: Prompt) -> tuple[int, str | None, int, int]:
    """The first character that is not the same, the part it is in (or at whose end it is), its line and column."""
    labels: list[tuple[str | None, int, str]] = []
    for label, text in now.pieces():
        labels += [(label, place, text) for place in range(len(text))]
    before = "".join(text for _, text in earlier.pieces())
    after = "".join(text for _, text in now.pieces())
    at = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    label, place, text = labels[at]
    if label is None and place == 0 and labels[at - 1][0] is not None:
        label, place, text = labels[at - 1]
        place += 1
    upto = text[:place].split("\n")
    return at, label, len(upto), len(upto[-1]) + 1


def tokens_of(text: str) -> list[int]:
    """Three characters a token, so that most differences do not begin with one."""
    return [zlib.crc32(text[i : i + 3].encode()) % 50_000 for i in range(0, len(text), 3)]


class Desk:
    """Requests that are asked and answered, one after the other, of prompts that a template renders."""

    def __init__(self, template: str = TEMPLATE) -> None:
        self.template = ChatTemplate({"default": template}, {}, "here")
        self.explainer = Explainer(lambda ids: "".join(f"[{token}]" for token in ids), BLOCK)
        self.count = 0

    def ask(
        self, prompt: Prompt, cached: int = 0, loss: Loss | None = None, tenant: str = "", session: str | None = None
    ) -> Explanation:
        text = self.template.render(prompt.conversation, prompt.tools)
        origin = Origin(
            text, lambda: find_places(text, prompt.conversation, prompt.tools, self.template.render), session
        )
        self.count += 1
        return self.answer(Request(tuple(tokens_of(text)), 4, tenant=tenant), origin, cached, loss)

    def answer(
        self, request: Request, origin: Origin, cached: int, loss: Loss | None, new: tuple[int, ...] = (1, 2, 3)
    ) -> Explanation:
        asking = self.explainer.asked(request, origin)
        asking.now.id = f"id-{self.count}"
        sequence = Sequence(request, 0, Sampler(request.sampling, request.prompt))
        sequence.count_cached(cached, "memory")
        sequence.loss = loss
        sequence.times.admitted, sequence.times.first = 10.0 * self.count, 10.0 * self.count + 3
        self.explainer.computed(asking, sequence)
        sequence.tokens += new
        return self.explainer.answered(asking, sequence, [asking.now.id])


@pytest.mark.parametrize("kind", ["date", "reminder", "tool", "order", "dropped", "character"])
@pytest.mark.parametrize("seed", range(34))
def test_what_was_edited_is_found(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind}-{seed}")
    desk, before = Desk(), draw(rng)
    now = edit(rng, before, kind)
    assert "".join(text for _, text in now.pieces()) == desk.template.render(now.conversation, now.tools)
    desk.ask(draw(random.Random(seed + 1000)))  # another conversation
    desk.ask(before)
    at, label, line, column = first_change(before, now)
    found = desk.ask(now, cached=at // 3 // BLOCK * BLOCK)
    assert found.reason == CHANGED
    assert found.nearest == "id-2"
    difference = found.difference
    assert difference is not None
    assert difference.character == at
    assert difference.token == found.common == at // 3
    assert difference.now.after[:1] != difference.earlier.after[:1]
    assert difference.now.before == difference.earlier.before
    if label is None:
        assert difference.now.where.startswith("the template, after ")
    else:
        assert (difference.now.where, difference.now.line, difference.now.column) == (label, line, column)


def long_prompt() -> Prompt:
    return draw(random.Random(5))


def test_where_a_template_changes_what_it_is_given_parts_are_looked_for_in_their_order() -> None:
    desk, before = Desk(CUTTING), long_prompt()
    now = replace(before, messages=(*before.messages[:4], ("user", "Quite another question."), *before.messages[5:]))
    desk.ask(before)
    difference = desk.ask(now).difference
    assert difference is not None
    assert difference.now.where == "message 6 (user)"
    assert (difference.now.line, difference.now.column) == (1, 1)
    assert difference.now.after.startswith("Quite another question.")


def test_a_prompt_that_goes_on_is_no_change() -> None:
    desk, before = Desk(), long_prompt()
    count = desk.ask(before).prompt_tokens
    more = replace(before, messages=(*before.messages, ("assistant", "Yes."), ("user", "And then?")))
    found = desk.ask(more, cached=count // BLOCK * BLOCK)
    assert found.reason == CONTINUED
    assert found.nearest == "id-1"


def test_what_was_lost_is_told_and_what_it_cost() -> None:
    desk, prompt = Desk(), long_prompt()
    count = desk.ask(prompt).prompt_tokens
    for loss in (Loss.EVICTED, Loss.EXPIRED, Loss.CORRUPT):
        found = desk.ask(prompt, cached=128, loss=loss)
        assert found.reason == loss
        assert (found.computed, found.again) == (count - 128, count - 129)  # the last is always computed
        assert found.again_seconds == pytest.approx(3.0 * found.again / found.computed)
    assert desk.ask(prompt, cached=128).reason == UNKNOWN
    # A shorter prompt, and all but its last block was there: nothing is wrong, and nothing is paid again.
    for cached in ((count - 1) // BLOCK * BLOCK, count - 1):
        found = desk.ask(prompt, cached=cached)
        assert (found.reason, found.computed, found.again) == (CONTINUED, count - cached, 0)


def test_what_is_new_is_not_compared() -> None:
    desk = Desk()
    first = desk.ask(long_prompt())
    other = desk.ask(draw(random.Random(77)))
    for found in (first, other):
        assert found.reason == NEW
        assert (found.nearest, found.difference, found.again_seconds) == (None, None, None)
    # After a restart nothing is remembered, and the disk may know why.
    assert Desk().ask(long_prompt(), loss=Loss.NAMESPACE).reason == Loss.NAMESPACE
    kept = Desk().ask(long_prompt(), cached=640)
    assert kept.reason == KEPT
    assert (kept.nearest, kept.again, kept.again_seconds) == (None, None, None)


def test_tokens_paid_again_are_those_that_the_earlier_request_had() -> None:
    desk, before = Desk(), long_prompt()
    now = replace(before, system="Another first line.\n" + before.system)
    count = desk.ask(before).prompt_tokens
    found = desk.ask(now)
    # The characters of a token are others then, and nothing is alike.
    assert len("Another first line.\n") % 3
    assert (found.reason, found.again) == (NEW, None)
    aligned = desk.ask(replace(before, system="Another first line.\n?" + before.system))
    assert aligned.again is not None
    assert count - 60 < aligned.again <= count
    assert aligned.again_seconds == pytest.approx(3.0 * aligned.again / aligned.computed)


def test_nothing_of_another_tenant_is_compared_or_told() -> None:
    desk, prompt = Desk(), long_prompt()
    mine = desk.ask(prompt, tenant="a")
    theirs = desk.ask(prompt, tenant="b")
    assert theirs.reason == NEW
    assert theirs.nearest is None
    assert desk.explainer.told("a", mine.id) == mine
    assert desk.explainer.told("b", mine.id) is None
    assert desk.explainer.told("a", theirs.id) is None


def talk(desk: Desk, prompt: Prompt, drawn: str, came_back: str, retokenized: bool = False) -> Explanation:
    """Two turns: `drawn` is what the first was answered, and `came_back` what the second has of that."""
    before = desk.template.render(prompt.conversation, prompt.tools)
    desk.count += 1
    desk.answer(Request(tuple(bytes_of(before)), 4), Origin(before), 0, None, tuple(bytes_of(drawn)))
    more = replace(prompt, messages=(*prompt.messages, ("assistant", came_back), ("user", "And then?")))
    text = desk.template.render(more.conversation, more.tools)
    origin = Origin(text, lambda: find_places(text, more.conversation, more.tools, desk.template.render))
    desk.count += 1
    tokens = bytes_of(text)
    if retokenized:
        at = text.index(came_back) + len(came_back) // 4
        tokens[at : at + 2] = [256 + tokens[at]]
    cached = first_difference(text, before + drawn)
    found = desk.answer(Request(tuple(tokens), 4), origin, cached, None)
    assert found.nearest == f"id-{desk.count - 1}"
    return found


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


ANSWER = "First one thing, then another, and at the end of it all the third, which took the longest of them."


def spelled() -> Desk:
    desk = Desk()
    desk.explainer = Explainer(lambda ids: bytes(id % 256 for id in ids).decode(), BLOCK)
    return desk


def test_an_answer_that_came_back_without_its_reasoning_was_changed() -> None:
    found = talk(spelled(), long_prompt(), f"<think>Well, well.</think>{ANSWER}<|im_end|>", ANSWER)
    assert found.reason == CHANGED
    assert found.where == "message 11 (assistant), line 1"
    difference = found.difference
    assert difference is not None
    assert (difference.now.column, difference.earlier.where, difference.earlier.line) == (1, "its answer", None)
    assert difference.now.after.startswith("First one thing")
    assert difference.earlier.after.startswith("<think>Well")
    assert found.again is not None
    assert found.again >= len(ANSWER)


def test_an_answer_that_came_back_as_it_was_or_gave_way_to_another_is_gone_on_from() -> None:
    same = talk(spelled(), long_prompt(), f"{ANSWER}<|im_end|>", ANSWER)
    assert (same.reason, same.difference, same.note) == (CONTINUED, None, None)
    other = talk(spelled(), long_prompt(), f"{ANSWER}<|im_end|>", "Nothing of that was true, as was found on Friday.")
    assert other.reason == CONTINUED
    assert other.where == "message 11 (assistant), line 1"


def test_an_answer_that_is_split_into_other_tokens_is_told() -> None:
    found = talk(spelled(), long_prompt(), f"{ANSWER}<|im_end|>", ANSWER, retokenized=True)
    assert (found.reason, found.difference) == (CONTINUED, None)
    assert found.note is not None
    assert "other tokens of the same text" in found.note


def test_what_is_lost_and_like_nothing_is_compared_with_nothing() -> None:
    desk = Desk()
    desk.ask(draw(random.Random(77)))
    found = desk.ask(long_prompt(), loss=Loss.EXPIRED)
    assert (found.reason, found.nearest, found.again, found.difference) == (Loss.EXPIRED, None, None, None)


def test_a_session_that_turns_to_something_else_is_compared_with_what_others_asked() -> None:
    desk, prompt = Desk(), long_prompt()
    desk.ask(prompt, session="one")
    desk.ask(draw(random.Random(77)), session="two")
    found = desk.ask(prompt, session="two", cached=640)
    assert found.nearest == "id-1"


def test_a_session_is_compared_with_itself() -> None:
    desk, prompt = Desk(), long_prompt()
    desk.ask(prompt, session="one")
    desk.ask(edit(random.Random(1), prompt, "dropped"), session="two")
    again = desk.ask(edit(random.Random(1), prompt, "dropped"), session="one")
    assert again.nearest == "id-1"


def asked(tokens: list[int], tenant: str = "", number: int = 0) -> Asked:
    return Asked(f"id-{number}", tenant, None, np.array(tokens, np.uint32), len(tokens), "x" * len(tokens), tuple)


def test_history_is_bounded_in_number_and_in_bytes() -> None:
    few = History(most=3)
    for number in range(10):
        few.add(asked([number] * 20, number=number))
    assert [one.id for one in few.of("")] == ["id-7", "id-8", "id-9"]
    small = History(most_bytes=3 * (20 * 4 + 20 * 8))
    for number in range(10):
        small.add(asked([number] * 20, number=number))
    assert len(small) == 3


def test_common_and_grams_count_as_a_plain_loop_does() -> None:
    rng = random.Random(3)
    for _ in range(50):
        a, b = ([rng.randrange(3) for _ in range(rng.randint(0, 60))] for _ in range(2))
        b = a[: rng.randint(0, len(a))] + b
        ids = [np.array(tokens, np.uint32) for tokens in (a, b)]
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common(*ids) == expected
        runs = {tuple(b[i : i + 8]) for i in range(len(b) - 7)}
        covered = {i + k for i in range(len(a) - 7) if tuple(a[i : i + 8]) in runs for k in range(8)}
        assert set(np.flatnonzero(Grams(ids[0]).found_in(ids[1])).tolist()) == covered
