"""What a chat request becomes: the prompt, the job, the grammar; and what comes back."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_model
from kvist.base.errors import ContextError, RequestError, TimedOut
from kvist.runtime.request import FinishReason, Sampling
from kvist.service.chat import Chat, ChatDelta, ChatRequest, Options, Tool, ToolChoice, text_job
from kvist.service.serving import Serving
from kvist.service.session import Delta, Job, NewToken
from kvist.text.chat import ChatTemplate
from kvist.text.response import FORMATS, Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd, joined
from tiny_model import open_serving, write_tiny_model

ASK = ({"role": "user", "content": "What of the tree?"},)
LOOK = Tool(
    "look_up", "Finds it.", {"type": "object", "properties": {"what": {"enum": ["a", "b"]}}, "required": ["what"]}
)
STOP = Tool("stop", None, {"type": "object", "properties": {}, "additionalProperties": False})
WARM = Options(max_tokens=60, sampling=Sampling(temperature=1.0, seed=1))


class Recorded:
    """A session that says what it was told to say."""

    def __init__(self, job: Job, texts: list[str]) -> None:
        self.job = job
        self.cancelled = 0
        self.prompt_tokens, self.cached_tokens, self.new_tokens = len(job.request.prompt), 0, 0
        self.prompt_logprobs: list[Any] = []
        self.warnings = job.warnings
        self._texts = texts

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for index, text in enumerate(self._texts):
            for choice in range(self.job.choices):
                last = index == len(self._texts) - 1
                yield Delta(choice, text, (), FinishReason.STOP if last else None)

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """Not started: jobs are looked at, not run."""
    return open_serving(write_tiny_model(tmp_path_factory.mktemp("chat") / "tiny"))


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """One whose markers are tokens of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "_SPECIAL", ["<|im_start|>", tiny_model.EOS, "<tool_call>", "<think>", "</think>"])
        return open_serving(write_tiny_model(tmp_path_factory.mktemp("marked") / "tiny"))


def patched(patch: pytest.MonkeyPatch, serving: Serving, source: str) -> None:
    """Give it another chat template."""
    patch.setattr(serving, "template", ChatTemplate({"default": source}, {}, "here"))


@pytest.fixture
def ask(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Job, list[ChatDelta]]]:
    """Start a chat; the job that it made, and what it makes of the texts that come back."""

    def run(request: ChatRequest, *texts: str, of: Serving = serving) -> tuple[Job, list[ChatDelta]]:
        monkeypatch.setattr(of, "submit", lambda job: Recorded(job, list(texts) or [""]))
        session = Chat(of).start(request)

        async def read() -> list[ChatDelta]:
            return [delta async for delta in session]

        deltas = asyncio.run(read())
        run.called = session.called  # type: ignore[attr-defined]
        return session.session.job, deltas  # type: ignore[attr-defined]

    return run


def test_the_prompt_is_the_rendered_conversation_without_another_beginning(serving: Serving, ask: Any) -> None:
    job, _ = ask(ChatRequest(ASK, WARM))
    text = serving.tokenizer.decode(list(job.request.prompt), skip_special=False)
    assert text == "<|im_start|>user\nWhat of the tree?<|im_end|>\n<|im_start|>assistant\n"
    assert job.request.stop_ids == serving.tokenizer.eos_ids
    assert (job.request.max_tokens, job.request.sampling, job.choices) == (60, WARM.sampling, 1)
    assert Chat(serving).count(ChatRequest(ASK, WARM)) == len(job.request.prompt)
    job, _ = ask(
        ChatRequest(ASK, replace(WARM, max_tokens=None, ignore_eos=True, stops=("x",), priority=3, tenant="t"))
    )
    assert job.request.max_tokens == serving.context - len(job.request.prompt)
    assert (job.request.stop_ids, job.stops) == (frozenset(), ("x",))
    assert (job.request.priority, job.request.tenant) == (3, "t")


def test_stop_strings_of_the_checkpoint_stop_every_answer(serving: Serving, ask: Any, tmp_path: Path) -> None:
    directory = write_tiny_model(tmp_path / "tiny")
    (directory / "generation_config.json").write_text(json.dumps({"stop_strings": ["\n\n"]}))
    assert serving.template is not None
    assert open_serving(directory).template.stops == ("\n\n",)  # type: ignore[union-attr]
    serving.template.stops, before = ("\n\n",), serving.template.stops
    try:
        job, _ = ask(ChatRequest(ASK, replace(WARM, stops=("x",))))
    finally:
        serving.template.stops = before
    assert job.stops == ("x", "\n\n")


def test_calls_and_reasoning_come_back_as_parts(ask: Any) -> None:
    text = '<think>Hm</think>Yes.<tool_call>\n{"name": "look_up", "arguments": {"what": "a"}}\n</tool_call>'
    request = ChatRequest(ASK, WARM, tools=(LOOK,))
    job, deltas = ask(request, *text)
    assert job.keep_special
    parts = joined([part for delta in deltas for part in delta.parts])
    assert parts == [
        Reasoning("Hm"),
        Content("Yes."),
        ToolCallBegin(0, "look_up"),
        ToolCallArguments(0, '{"what": "a"}'),
        ToolCallEnd(0),
    ]
    assert ask.called == {0}
    assert deltas[-1].finish is FinishReason.STOP


def test_choices_are_taken_apart_each_by_itself(ask: Any) -> None:
    request = ChatRequest(ASK, replace(WARM, choices=2), tools=(LOOK,))
    job, deltas = ask(request, "<think>a", "b</think>c <tool", "_call")
    assert job.choices == 2
    for choice in range(2):
        parts = [part for delta in deltas if delta.choice == choice for part in delta.parts]
        assert joined(parts) == [Reasoning("ab"), Content("c <tool_call")], "what was held back comes with the end"


def test_a_failure_and_what_came_before_it_are_passed_on(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = TimedOut("too long")

    class Failing(Recorded):
        async def __aiter__(self) -> AsyncIterator[Delta]:
            yield Delta(0, "a <tool", (NewToken(7, None),))
            yield Delta(0, "", (), FinishReason.FAILED, None, failure)

    monkeypatch.setattr(serving, "submit", lambda job: Failing(job, []))
    session = Chat(serving).start(ChatRequest(ASK, WARM, tools=(LOOK,)))

    async def read() -> list[ChatDelta]:
        return [delta async for delta in session]

    first, last = asyncio.run(read())
    assert first == ChatDelta(0, (Content("a"),), (NewToken(7, None),), None, None, None)
    assert last == ChatDelta(0, (Content(" <tool"),), (), FinishReason.FAILED, None, failure)
    session.cancel()
    session.cancel()
    assert session.session.cancelled == 2  # type: ignore[attr-defined]


def test_without_tools_what_looks_like_a_call_is_text(ask: Any) -> None:
    text = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
    _, deltas = ask(ChatRequest(ASK, WARM), text)
    assert joined([part for delta in deltas for part in delta.parts]) == [Content(text)]
    _, deltas = ask(ChatRequest(ASK, WARM, tools=(LOOK,), tool_choice=ToolChoice.NONE), text)
    assert joined([part for delta in deltas for part in delta.parts]) == [Content(text)]
    assert ask.called == set()


def follow(serving: Serving, job: Job, text: str) -> bool:
    """Whether the job's grammar lets the model write `text`, and end there."""
    import torch

    assert job.request.grammar is not None
    grammar = job.request.grammar()
    for token in [*serving.tokenizer.encode(text, add_special=False), next(iter(serving.tokenizer.eos_ids))]:
        row = torch.zeros(serving.loaded.config.vocab_size)
        grammar.forbid(row)
        if row[token] == -torch.inf:
            return False
        if token not in serving.tokenizer.eos_ids:
            grammar.accept(token)
    return True


CALL = '<tool_call>\n{"name": "look_up", "arguments": {"what": "a"}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "look_up", "arguments": {"what": "c"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("change", "allowed", "forbidden"),
    [
        ({"schema": NUMBER}, ['{"n": 3}'], ["Hello", '{"n": "x"}', CALL]),
        ({"schema": {}}, ["{}", '{"any": ["thing"]}'], ["[]", "3", "Hello"]),
        (
            {"tools": (LOOK, STOP), "tool_choice": ToolChoice.REQUIRED},
            [CALL, OTHER, f"{CALL}\n{OTHER}"],
            ["Hello", WRONG],
        ),
        ({"tools": (LOOK, STOP), "tool_choice": ToolChoice.REQUIRED, "tool_name": "stop"}, [OTHER], [CALL, "Hello"]),
        (
            {"tools": (LOOK, STOP), "tool_choice": ToolChoice.REQUIRED, "parallel_tool_calls": False},
            [CALL, OTHER],
            [f"{CALL}\n{OTHER}"],
        ),
        ({"tools": (replace(LOOK, strict=True),)}, ["Hello", CALL, f"So: {CALL}"], [WRONG]),
        ({"tools": (LOOK,), "schema": NUMBER}, ['{"n": 3}', CALL], ["Hello"]),
        ({"tools": (LOOK,), "schema": NUMBER, "tool_choice": ToolChoice.NONE}, ['{"n": 3}'], [CALL, "Hello"]),
    ],
)
def test_answers_are_held_to_what_was_asked_for(
    serving: Serving, ask: Any, change: dict[str, Any], allowed: list[str], forbidden: list[str]
) -> None:
    job, _ = ask(replace(ChatRequest(ASK, WARM), **change))
    assert [text for text in allowed if not follow(serving, job, text)] == []
    assert [text for text in forbidden if follow(serving, job, text)] == []


REASONING = [
    # how the prompt ends, what may follow, what may not
    ("", ["<think>any {</think>{}", "<think></think>{}", "{}"], ["x", "<think>a</think>x"]),
    ("<think>\n", ["any {</think>{}"], ["a</think>x"]),
    ("<think>\n\n</think>\n\n", ["{}"], ["<think>a</think>{}", "x"]),
]


@pytest.mark.parametrize(("ending", "allowed", "forbidden"), REASONING)
def test_reasoning_is_free_and_the_answer_after_it_is_not(
    marked: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch, ending: str, allowed: list[str], forbidden: list[str]
) -> None:
    patched(monkeypatch, marked, "{{ messages[0].content }}" + ending)
    job, _ = ask(ChatRequest(ASK, WARM, schema={}), of=marked)
    assert [text for text in allowed if not follow(marked, job, text)] == []
    assert [text for text in forbidden if follow(marked, job, text)] == []


def test_the_token_that_begins_a_call_is_kept_back_where_none_is_wanted(marked: Serving, ask: Any) -> None:
    biased = replace(WARM, sampling=replace(WARM.sampling, logit_bias=((5, 1.0),)))
    request = ChatRequest(ASK, biased, tools=(LOOK,), tool_choice=ToolChoice.NONE)
    [opening] = marked.tokenizer.encode("<tool_call>", add_special=False)
    assert ask(request, of=marked)[0].request.sampling.logit_bias == ((5, 1.0), (opening, -100.0))
    for other in (replace(request, tool_choice=ToolChoice.AUTO), replace(request, tools=())):
        assert ask(other, of=marked)[0].request.sampling.logit_bias == ((5, 1.0),)
    # The prompt is the same as with calls, so that what is cached of it serves.
    prompts = [ask(replace(request, tool_choice=choice), of=marked)[0].request.prompt for choice in ("none", "auto")]
    assert prompts[0] == prompts[1]


SHOWN = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.id }} {{ c.function.arguments | tojson }} {% endfor %}"
SHOWN += "{{ m.tool_call_id }}{% endfor %}"
TEXT = "arguments + ''"  # a template that takes texts alone
IDENTIFIER = "call_0123456789abcdef"


def calling(arguments: Any) -> tuple[dict[str, Any], ...]:
    call = {"id": IDENTIFIER, "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    return (
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": IDENTIFIER, "content": "yes"},
    )


@pytest.mark.parametrize(
    ("arguments", "extra", "shown"),
    [
        ('{"b": 1, "a": 2}', "", '{"b": 1, "a": 2}'),
        ({"b": 1}, "", '{"b": 1}'),
        ('{"b": 1', "", '{"arguments": "{\\"b\\": 1"}'),  # no JSON: what the model wrote, within some
        ("[1]", "", '{"arguments": [1]}'),
        ("", "", "{}"),
        ('{"b":  1}', TEXT, '{"b":  1}'),
        ('{"b": 1', TEXT, '{"b": 1'),
    ],
)
def test_arguments_are_given_as_the_template_takes_them(
    serving: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch, arguments: Any, extra: str, shown: str
) -> None:
    patched(monkeypatch, serving, SHOWN.replace("arguments | tojson", extra or "arguments | tojson"))
    messages = calling(arguments)
    job, _ = ask(ChatRequest(messages, WARM))
    text = serving.tokenizer.decode(list(job.request.prompt))
    assert text == f"{IDENTIFIER} {shown} {IDENTIFIER}"
    assert messages == calling(arguments), "what the caller holds is not changed"


def test_identifiers_are_short_where_the_template_takes_no_others(
    serving: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, serving, SHOWN + "{# id|length != 9 #}")
    text = serving.tokenizer.decode(list(ask(ChatRequest(calling({}), WARM))[0].request.prompt))
    first, _, second = text.split(" ")
    assert first == second, "the answer is still that of the call"
    assert re.fullmatch("[a-zA-Z0-9]{9}", first)


def test_nothing_is_held_to_a_grammar_that_was_not_asked_for(ask: Any) -> None:
    for request in (ChatRequest(ASK, WARM), ChatRequest(ASK, WARM, tools=(LOOK,))):
        assert ask(request)[0].request.grammar is None


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ChatRequest(ASK, WARM, tools=(LOOK, LOOK)), "two tools have the name 'look_up'"),
        (ChatRequest(ASK, WARM, tool_choice=ToolChoice.REQUIRED), "no tools are given"),
        (
            ChatRequest(ASK, WARM, tools=(LOOK,), tool_choice=ToolChoice.REQUIRED, tool_name="x"),
            "there is no tool 'x' to call among those given: look_up",
        ),
        (ChatRequest((), WARM), "at least one message"),
        (
            ChatRequest(ASK, WARM, schema={"type": "nothing"}),
            "the JSON schema of the answer: type should be one or",
        ),
        (ChatRequest(ASK, replace(WARM, stops=("",))), "stop string is empty"),
        (ChatRequest(ASK, WARM, continue_final=True), "only a last message of the assistant"),
        (
            ChatRequest((*ASK, {"role": "assistant", "content": "So"}), WARM, schema={}, continue_final=True),
            "cannot be held to a schema",
        ),
        (ChatRequest(ASK, WARM, template_variables={"tools": []}), "cannot be called 'tools'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(serving: Serving, ask: Any, request_: ChatRequest, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        ask(request_)


def test_many_tools_are_looked_through_in_no_time(serving: Serving) -> None:
    tools = tuple(Tool(f"tool_{index:06}", None, {}) for index in range(50_000))
    begun = time.perf_counter()
    with pytest.raises(RequestError, match="two tools have the name 'tool_049999'"):
        Chat(serving).count(ChatRequest(ASK, WARM, tools=(*tools, tools[-1])))
    assert time.perf_counter() - begun < 2  # to compare each with each takes more than a minute


def test_a_template_without_a_place_for_tools_may_take_none(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, serving, "{{ messages[0].content }}")
    monkeypatch.setattr(serving, "generic_tools", False)
    with pytest.raises(RequestError, match="no place for tools"):
        Chat(serving).count(ChatRequest(ASK, WARM, tools=(LOOK,)))


def test_calls_that_nothing_announces_can_be_required_and_not_strict(
    serving: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "format", FORMATS["llama3-json"])
    job, _ = ask(ChatRequest(ASK, WARM, tools=(LOOK,), tool_choice=ToolChoice.REQUIRED))
    assert follow(serving, job, '{"name": "look_up", "parameters": {"what": "a"}}')
    with pytest.raises(RequestError, match="not announced by a marker"):
        ask(ChatRequest(ASK, WARM, tools=(replace(LOOK, strict=True),)))
    monkeypatch.setattr(serving, "format", FORMATS["plain"])
    with pytest.raises(RequestError, match="no known way to call tools"):
        ask(ChatRequest(ASK, WARM, tools=(LOOK,), tool_choice=ToolChoice.REQUIRED))


def test_a_model_without_a_template_says_so(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "template", None)
    with pytest.raises(RequestError, match="no chat template"):
        Chat(serving).count(ChatRequest(ASK, WARM))


def test_a_prompt_that_leaves_no_room_is_refused_with_numbers(serving: Serving) -> None:
    with pytest.raises(ContextError, match="prompt is too long: 2048 tokens > 2047 maximum"):
        text_job(serving, [1] * 2048, WARM)
    job = text_job(serving, [1] * 2040, WARM)
    assert job.request.max_tokens == 8
    scored = text_job(serving, [1] * 2048, replace(WARM, max_tokens=0, prompt_logprobs=0))
    assert scored.request.max_tokens == 0


def test_tools_are_told_of_in_words_where_the_template_has_no_place_for_them(
    serving: Serving, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, serving, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    monkeypatch.setattr(serving, "format", FORMATS["plain"])
    request = ChatRequest(ASK, WARM, tools=(LOOK, STOP), tool_choice=ToolChoice.REQUIRED)
    job, deltas = ask(request, CALL)
    prompt = serving.tokenizer.decode(list(job.request.prompt), skip_special=False)
    assert prompt.startswith("<system>You can use these functions.")
    assert prompt.endswith("<user>What of the tree?")
    assert '"name": "look_up"' in prompt
    assert follow(serving, job, CALL)
    assert not follow(serving, job, WRONG)
    assert not follow(serving, job, "Hello")
    parts = joined([part for delta in deltas for part in delta.parts])
    assert parts[0] == ToolCallBegin(0, "look_up")
    # The same prompt where no call is wanted, and no call in what comes.
    job, deltas = ask(replace(request, tool_choice=ToolChoice.NONE), CALL)
    assert serving.tokenizer.decode(list(job.request.prompt), skip_special=False) == prompt
    assert joined([part for delta in deltas for part in delta.parts]) == [Content(CALL)]


def test_what_a_grammar_cannot_hold_is_named_in_a_warning_or_refused(serving: Serving, ask: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"what": {"type": "array", "uniqueItems": True, "items": {"not": {}}}},
    }
    tool = Tool("look_up", None, parameters, place="tools[1].function.parameters")
    job, _ = ask(ChatRequest(ASK, WARM, tools=(STOP, tool), tool_choice=ToolChoice.REQUIRED))
    assert job.warnings == (
        "the arguments of 'look_up' were not held to all of its schema; left to the client: uniqueItems, not",
    )
    assert ask(ChatRequest(ASK, WARM, tools=(STOP, tool)))[0].warnings == ()
    strict = (STOP, replace(tool, strict=True))
    for choice in (ToolChoice.AUTO, ToolChoice.REQUIRED):
        with pytest.raises(RequestError, match=r"the strict tool 'look_up': .*uniqueItems") as refusal:
            ask(ChatRequest(ASK, WARM, tools=strict, tool_choice=choice))
        assert refusal.value.param == "tools[1].function.parameters"
    with pytest.raises(RequestError, match=r"the strict tool 'x': required should be a list of names") as refusal:
        ask(ChatRequest(ASK, WARM, tools=(Tool("x", None, {"required": 5}, True, "tools[0]"),)))
    with pytest.raises(RequestError, match=r"the JSON schema of the answer: .*uniqueItems") as refusal:
        ask(ChatRequest(ASK, WARM, schema=parameters, schema_place="text.format.schema"))
    assert refusal.value.param == "text.format.schema"
