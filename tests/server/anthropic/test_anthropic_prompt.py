"""From bodies of requests to the messages that templates take."""

from typing import Any

import pytest

from kvist.base.errors import RequestError
from kvist.runtime.request import Sampling
from kvist.server.anthropic.prompt import chat_request, up_to_last_mark
from kvist.server.anthropic.schema import Prompt
from kvist.service.chat import ChatRequest, Options

CALL = {"type": "tool_use", "id": "c1", "name": "read", "input": {"path": "a.txt"}}
OTHER = {"type": "tool_use", "id": "c2", "name": "list", "input": {}}
USER = {"role": "user", "content": "Hi"}


def text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def result(call: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call, "content": content, **fields}


def request(messages: list[Any], **fields: Any) -> ChatRequest:
    body = Prompt.model_validate({"model": "m", "messages": messages, **fields})
    return chat_request(body, Options(max_tokens=1, sampling=Sampling()))


def rendered(messages: list[Any], **fields: Any) -> list[dict[str, Any]]:
    return [dict(message) for message in request(messages, **fields).messages]


def test_blocks_of_text_are_lines_of_one_message() -> None:
    assert rendered([{"role": "user", "content": [text("a"), text("b")]}], system=[text("s"), text("t")]) == [
        {"role": "system", "content": "s\nt"},
        {"role": "user", "content": "a\nb"},
    ]


def test_adjoining_messages_of_a_role_are_one() -> None:
    said = [USER, {"role": "user", "content": "there"}, {"role": "assistant", "content": "A"}]
    said += [{"role": "assistant", "content": [text("B")]}, {"role": "user", "content": "C"}]
    assert rendered(said) == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "AB"},
        {"role": "user", "content": "C"},
    ]


def test_results_come_before_what_the_user_says_in_the_order_of_the_body() -> None:
    turn = [text("first"), result("c2", [text("x"), text("y")]), result("c1", "no", is_error=True), text("second")]
    assert rendered(
        [USER, {"role": "assistant", "content": [text("I look."), CALL, OTHER]}, {"role": "user", "content": turn}]
    ) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "read", "arguments": {"path": "a.txt"}}},
                {"id": "c2", "type": "function", "function": {"name": "list", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c2", "name": "list", "content": "x\ny"},
        {"role": "tool", "tool_call_id": "c1", "name": "read", "content": "Error: no"},
        {"role": "user", "content": "first\nsecond"},
    ]


@pytest.mark.parametrize("content", [None, "", []])
def test_a_result_may_be_empty(content: Any) -> None:
    turns = [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result("c1", content)]}]
    assert rendered(turns)[-1] == {"role": "tool", "tool_call_id": "c1", "name": "read", "content": ""}


def test_thinking_is_the_reasoning_of_its_message() -> None:
    turn = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "redacted_thinking", "data": "Zm9v"},
        text("Yes."),
    ]
    assert rendered([USER, {"role": "assistant", "content": turn}, USER])[1] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "Hm.",
    }


def test_the_line_that_changes_with_each_request_is_left_out() -> None:
    billing = text("x-anthropic-billing-header: cc_version=2.1; cch=9f3a1;")
    assert rendered([USER], system=[billing, text("Be kind.")]) == rendered([USER], system="Be kind.")
    assert rendered([USER], system=[billing]) == [{"role": "user", "content": "Hi"}]


def test_a_system_message_on_the_way_is_part_of_the_users_turn() -> None:
    answer = {"role": "assistant", "content": "A"}
    note = {"role": "system", "content": [text("Be brief.")]}
    settings = {"role": "system", "content": []}
    marked = "<system-reminder>\nBe brief.\n</system-reminder>"
    assert rendered([USER, note, answer, settings, USER], system="s") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": f"Hi\n{marked}"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Hi"},
    ]
    assert rendered([USER, answer, note])[-1] == {"role": "user", "content": marked}
    call = {"role": "assistant", "content": [CALL]}
    assert rendered([USER, call, {"role": "user", "content": [result("c1", "x")]}, note])[2:] == [
        {"role": "tool", "tool_call_id": "c1", "name": "read", "content": "x"},
        {"role": "user", "content": marked},
    ]


def test_the_last_message_is_continued_when_it_is_the_assistants() -> None:
    assert not request([USER]).continue_final
    continued = request([USER, {"role": "assistant", "content": "The answer is ("}])
    assert continued.continue_final
    assert continued.messages[-1]["content"] == "The answer is ("


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        (None, {"enable_thinking": False}),
        ({"type": "enabled", "budget_tokens": 1024}, {"enable_thinking": True}),
        ({"type": "adaptive", "display": "summarized"}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
    ],
)
def test_thinking_is_a_variable_of_the_template(thinking: Any, expected: dict[str, Any]) -> None:
    assert request([USER], thinking=thinking).template_variables == expected


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_may_stand_in_its_old_and_its_new_place(place: str) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    assert request([USER], **{place: {"format": form} if place == "output_config" else form}).schema == form["schema"]
    assert request([USER]).schema is None


def test_unknown_fields_are_ignored() -> None:
    message = {**USER, "content": [text("Hi") | {"citations": None}], "id": "x"}
    assert rendered([message], context_management={"edits": []}) == [{"role": "user", "content": "Hi"}]


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://localhost/a.png"}}


@pytest.mark.parametrize(
    ("messages", "fields", "why"),
    [
        ([{"role": "user", "content": [text("a"), IMAGE]}], {}, "messages.0.content.1: blocks of type 'image'"),
        (
            [{"role": "user", "content": [IMAGE | {"type": "document"}]}],
            {},
            "messages.0.content.0.source: documents of type 'url'",
        ),
        (
            [USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result("c1", [IMAGE])]}],
            {},
            "messages.2.content.0.content.0: blocks of type 'image'",
        ),
        (
            [{"role": "user", "content": [result("c9", "x")]}],
            {},
            "messages.0.content.0.tool_use_id: no tool_use before",
        ),
        ([{"role": "user", "content": [CALL]}], {}, "messages.0.content.0: tool_use does not belong in a user message"),
        (
            [USER, {"role": "assistant", "content": [result("c1", "x")]}, USER],
            {},
            "messages.1.content.0: tool_result does not belong in an assistant message",
        ),
        (
            [USER, {"role": "system", "content": [CALL]}],
            {},
            "messages.1.content.0: tool_use does not belong in a system",
        ),
        ([{"role": "user", "content": ""}], {}, "messages.0: a user message must not be empty"),
        ([USER, {"role": "user", "content": []}, {"role": "assistant", "content": [CALL]}], {}, "messages.2: the last"),
        ([USER, {"role": "assistant", "content": ""}], {}, "messages.1: the last message can be continued only"),
        ([{"role": "system", "content": []}], {}, "messages: there is no text"),
        (
            [USER],
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools.0: .*'web_search_20250305'",
        ),
        ([USER], {"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools.0: .*'computer_20250124'"),
        ([USER], {"tools": [{"type": "custom", "name": "x"}]}, "tools.0.input_schema: a custom tool needs one"),
        ([USER], {"tool_choice": {"type": "auto", "name": "x"}}, "tool_choice: a name belongs to"),
        ([USER], {"tool_choice": {"type": "tool"}}, "tool_choice: a name belongs to"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_place(messages: list[Any], fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        request(messages, **fields)


DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Rain in Ulm."}}


def test_documents_of_text_are_read() -> None:
    titled = DOCUMENT | {"title": "weather.txt", "context": "of today", "cache_control": {"type": "ephemeral"}}
    parts = {"type": "document", "source": {"type": "content", "content": [text("one"), text("two")]}}
    plain = {"type": "document", "source": {"type": "content", "content": "three"}, "citations": {"enabled": False}}
    asked = request([{"role": "user", "content": [titled, parts, plain, text("Well?")]}])
    assert asked.messages[0]["content"] == (
        "<document>\n<source>weather.txt</source>\n<context>of today</context>\n"
        "<document_content>\nRain in Ulm.\n</document_content>\n</document>\n"
        "<document>\n<document_content>\none\ntwo\n</document_content>\n</document>\n"
        "<document>\n<document_content>\nthree\n</document_content>\n</document>\n"
        "Well?"
    )
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "a", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [DOCUMENT]}
    asked = request([USER, called, {"role": "user", "content": [result]}])
    assert "Rain in Ulm." in asked.messages[-1]["content"]


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (DOCUMENT | {"citations": {"enabled": True}}, "messages.0.content.0.citations: models here do not cite"),
        (DOCUMENT | {"source": {"type": "base64", "media_type": "application/pdf", "data": ""}}, "'base64'"),
        (DOCUMENT | {"source": {"type": "file", "file_id": "f"}}, "'file'"),
        (DOCUMENT | {"source": {"type": "content", "content": [IMAGE]}}, "content.0.source.content.0: .*'image'"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(block: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        request([{"role": "user", "content": [block]}])


@pytest.mark.parametrize(
    ("kind", "name", "command"),
    [
        ("bash_20241022", "bash", None),
        ("bash_20250124", "bash", None),
        ("text_editor_20250124", "str_replace_editor", "undo_edit"),
        ("text_editor_20250728", "str_replace_based_edit_tool", "insert"),
        ("text_editor_20991231", "str_replace_based_edit_tool", "insert"),
        ("memory_20250818", "memory", "rename"),
    ],
)
def test_tools_that_the_client_runs_are_described(kind: str, name: str, command: str | None) -> None:
    (tool,) = request([USER], tools=[{"type": kind, "name": name, "max_characters": 100}]).tools
    assert tool.name == name
    assert tool.description
    commands = tool.parameters["properties"]["command"].get("enum", [None])
    assert command in commands
    assert ("undo_edit" in commands) == (kind == "text_editor_20250124")


@pytest.mark.parametrize(
    "kind", ["web_search_20250305", "web_fetch_20260209", "code_execution_20260120", "tool_search_tool_bm25_20251119"]
)
def test_tools_that_a_server_would_run_are_refused_by_name(kind: str) -> None:
    with pytest.raises(RequestError, match=f"tools.0: .*{kind}"):
        request([USER], tools=[{"type": kind, "name": "any"}])


MARK = {"cache_control": {"type": "ephemeral"}}
TOOL = {"name": "read", "input_schema": {"type": "object"}}
ASKED = {"role": "user", "content": [text("a") | MARK, text("b")]}
PLACE = {"role": "user", "content": "-"}
SYSTEM = [text("s"), text("t")]
A = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("fields", "expected"),  # the messages of what is asked to be cached
    [
        ({"messages": [USER]}, None),
        ({"messages": [USER], **MARK}, None),
        ({"messages": [ASKED], **MARK}, None),  # the mark at the top stands behind all
        ({"messages": [{"role": "user", "content": [text("a"), text("b") | MARK]}]}, None),
        ({"messages": [ASKED], "system": SYSTEM}, [{"role": "system", "content": "s\nt"}, A]),
        ({"messages": [ASKED, {"role": "assistant", "content": "c"}, USER]}, [A]),
        ({"messages": [USER], "system": [text("s") | MARK, text("t")]}, [{"role": "system", "content": "s"}, PLACE]),
        ({"messages": [USER], "system": "s", "tools": [TOOL | MARK, TOOL | {"name": "write"}]},
         [{"role": "system", "content": "s"}, PLACE]),
        ({"messages": [USER, {"role": "assistant", "content": [text("c"), CALL | MARK]},
                       {"role": "user", "content": [result("c1", "r"), text("d")]}]},
         [USER, {"role": "assistant", "content": "c", "tool_calls": [{"id": "c1"}]}, PLACE]),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]},
                       {"role": "user", "content": [result("c1", [text("r") | MARK]), text("d")]}]},
         [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1"}]},
          {"role": "tool", "tool_call_id": "c1", "name": "read", "content": "r"}]),
    ],
)  # fmt: skip
def test_what_is_asked_to_be_cached_ends_with_the_last_mark(fields: dict[str, Any], expected: Any) -> None:
    part = up_to_last_mark(Prompt.model_validate({"model": "m", **fields}))
    assert (part is None) == (expected is None)
    if part is None:
        return
    found = [dict(message) for message in chat_request(part, Options(max_tokens=1, sampling=Sampling())).messages]
    for message in found:
        message.pop("reasoning_content", None)
        if "tool_calls" in message:
            message["tool_calls"] = [{"id": call["id"]} for call in message["tool_calls"]]
    assert found == expected
    assert part.tools == Prompt.model_validate({"model": "m", **fields}).tools
