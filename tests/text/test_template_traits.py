"""What a template does with tools and calls is found by trying it, and conversations are given as it takes them."""

from typing import Any

import pytest

from kvist.text.chat import ChatTemplate
from kvist.text.generic_tools import with_tools
from kvist.text.response import FORMATS, ToolCallArguments, ToolCallBegin, joined
from kvist.text.template_messages import for_template

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ ARGUMENTS }}]{% endfor %}"
EACH = TOOLS + "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}" + CALLS + "{% endfor %}"
JOINED = EACH.replace("{{ ARGUMENTS }}", "{{ 'args ' + c.function.arguments }}")  # DeepSeek V3.1
QUOTED = EACH.replace("{{ ARGUMENTS }}", "{{ c.function.arguments | tojson }}")  # Qwen2.5, Llama 3, Mistral
EITHER = EACH.replace(  # Qwen3
    "{{ ARGUMENTS }}",
    "{% if c.function.arguments is string %}{{ c.function.arguments }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
)
ITEMS = EACH.replace(  # Qwen3-Coder
    "{{ ARGUMENTS }}", "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
)
# DeepSeek V3 and R1: the calls stand where the content is none.
EXCLUSIVE = (
    TOOLS + "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<calls>"
    "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, {}, "here")


def turn(arguments: Any, content: str | None = None) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "so?"},
    ]


def rendered(source: str, arguments: Any, content: str | None = None) -> str:
    found = template(source)
    return found.render(for_template(turn(arguments, content), found))


@pytest.mark.parametrize(
    ("source", "text", "null", "splits"),
    [
        (JOINED, True, True, False),
        (QUOTED, False, True, False),
        (EITHER, True, True, False),
        (ITEMS, False, True, False),
        (EXCLUSIVE, True, True, True),
        (QUOTED.replace("m.content or ''", "m.content"), False, False, False),  # it would write "None"
        (QUOTED.replace("{{ m.content or '' }}", "{{ m.content + '' }}"), False, False, False),
    ],
)
def test_what_a_template_takes_is_found_by_trying(source: str, text: bool, null: bool, splits: bool) -> None:
    traits = template(source).traits
    assert (traits.takes_tools, traits.takes_system, traits.writes_calls) == (True, True, True)
    assert (traits.takes_argument_text, traits.takes_null, traits.splits) == (text, null, splits)


@pytest.mark.parametrize(
    ("source", "arguments", "shown"),
    [
        (JOINED, '{"a":  1}', 'args {"a":  1}'),
        (JOINED, '{"a', 'args {"a'),
        (QUOTED, '{"a":  1}', '{"a": 1}'),
        (QUOTED, '{"a', '{"arguments": "{\\"a"}'),
        (EITHER, '{"a":  1}', '{"a":  1}'),
        (EITHER, '{"a', '{"a'),
        (ITEMS, '{"a":  1}', "a=1;"),
        (ITEMS, '{"a', 'arguments={"a;'),
        (ITEMS, "[1, 2]", "arguments=[1, 2];"),
        (ITEMS, "null", ""),
    ],
)
def test_arguments_are_written_whatever_the_model_wrote(source: str, arguments: str, shown: str) -> None:
    assert rendered(source, arguments) == f"<user>hi<assistant>[look {shown}]<tool>rain<user>so?"


def test_calls_are_never_left_out() -> None:
    assert rendered(EXCLUSIVE, '{"a": 1}') == '<user>hi<calls>look{"a": 1}<tool>rain<user>so?'
    assert rendered(EXCLUSIVE, '{"a": 1}', "") == rendered(EXCLUSIVE, '{"a": 1}')
    apart = rendered(EXCLUSIVE, '{"a": 1}', "I look.")
    assert apart == '<user>hi<assistant>I look.<calls>look{"a": 1}<tool>rain<user>so?'
    assert "calls" not in template(EXCLUSIVE).render(turn('{"a": 1}', "I look.")), "as the template has it"


@pytest.mark.parametrize(("source", "system"), [(PLAIN, True), (WITHOUT_SYSTEM, False)])
def test_a_template_without_a_place_for_tools(source: str, system: bool) -> None:
    traits = template(source).traits
    assert (traits.takes_tools, traits.takes_system, traits.writes_calls) == (False, system, False)


TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}


def test_tools_are_told_of_in_words_and_calls_are_words() -> None:
    messages = [{"role": "system", "content": "Be kind."}, *turn('{"a": 1}', "I look.")]
    told = with_tools(messages, [TOOL], takes_system=True)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be kind.\n\n")
    assert '{"name": "look", "description": "Looks.", "parameters": {"type": "object"}}' in told[0]["content"]
    assert told[3]["content"] == "<tool_response>\nrain\n</tool_response>\nso?"
    generic = FORMATS["think"].with_generic_calls()
    parts = joined(generic.parser("", [TOOL]).push(told[2]["content"]))
    assert ToolCallBegin(0, "look") in parts
    assert ToolCallArguments(0, '{"a": 1}') in parts, "what is shown is what is read"
    assert generic.reasoning == ("<think>", "</think>")
    assert FORMATS["plain"].with_generic_calls().reasoning is None


def test_where_there_is_no_system_the_first_words_are_the_users() -> None:
    told = with_tools(turn('{"a": 1}'), [TOOL], takes_system=False)
    assert [message["role"] for message in told] == ["user", "assistant", "user"]
    assert told[0]["content"].endswith("\n\nhi")
    text = template(WITHOUT_SYSTEM).render(told)
    assert text.count("<tool_call>") == 2, "how to call, and the call"
    alone = with_tools([{"role": "user", "content": "hi"}], [TOOL], takes_system=True)
    assert [message["role"] for message in alone] == ["system", "user"]
    several = turn('{"a": 1}')
    several.insert(3, {"role": "tool", "tool_call_id": "c2", "content": "sun"})
    assert with_tools(several, [], takes_system=True)[-1]["content"].count("<tool_response>") == 2
