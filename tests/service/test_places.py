"""Where the parts of a prompt stand, in templates that write tools, calls and reasoning each in its own way."""

from itertools import pairwise
from typing import Any

import pytest

from kvist.service.places import find_places, spot
from kvist.text.chat import ChatTemplate

COMMENTS = """{{ messages[0].content }}

namespace functions {
{% for tool in tools %}// {{ tool.function.description }}
type {{ tool.function.name }} = (_: {
{%- for name, of in tool.function.parameters.properties.items() %}
{% if of.description %}// {{ of.description }}
{% endif %}{{ name }}: {{ of.type }},{% endfor %}
}) => any;

{% endfor %}}
{%- for m in messages[1:] %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"""
TAGS = """{% for tool in tools %}<tool name="{{ tool.function.name }}">{{ tool.function.description }}
{{ tool.function.parameters | tojson(indent=2) }}
</tool>
{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}<call {{ call.function.name }}>{{ call.function.arguments | tojson }}</call>
{%- endfor %}
{% endfor %}"""
LISTED = """{% for m in messages %}{% if m.role == 'user' and loop.last and tools %}[TOOLS] {{ tools | tojson }}[/TOOLS]
{%- endif %}[{{ m.role }}] {{ m.content | trim }}
{% endfor %}"""
WITHOUT_THOUGHTS = """{% for m in messages %}<|{{ m.role }}|>{% set said = m.content %}
{%- if '</think>' in said %}{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}{{ said }}
{% endfor %}"""
TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}Again: {{ messages[-1].content }}\n"
SHOUTED = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"


def tool(name: str) -> dict[str, Any]:
    path = {"type": "string", "description": f"Which file {name} takes."}
    function = {
        "name": name,
        "description": f"What {name} does.\nAnd what not.",
        "parameters": {"type": "object", "properties": {"path": path, "count": {"type": "integer"}}},
    }
    return {"type": "function", "function": function}


TOOLS = [tool("read_file"), tool("write_file"), tool("read")]
CALL = {"id": "1", "type": "function", "function": {"name": "read", "arguments": {"path": "a\nb", "count": 2}}}
MESSAGES = [
    {"role": "system", "content": "Be brief.\nBe kind."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "<think>Well.</think>\nAs you say.", "tool_calls": [CALL]},
    {"role": "user", "content": "  And then?\n"},
]


def parts(source: str) -> tuple[str, list[tuple[str, str]]]:
    template = ChatTemplate({"default": source}, {}, "here")
    text = template.render(MESSAGES, TOOLS)
    places = find_places(text, MESSAGES, TOOLS, template.render)
    assert all(a.end <= b.start for a, b in pairwise(places))
    return text, [(place.label, text[place.start : place.end]) for place in places]


@pytest.mark.parametrize("source", [COMMENTS, TAGS, LISTED])
def test_all_of_a_tool_is_that_tools_and_nothing_of_another(source: str) -> None:
    text, found = parts(source)
    for of in TOOLS:
        name = of["function"]["name"]
        ((_, written),) = [one for one in found if one[0] == f"tool {name!r}"]
        assert f"What {name} does." in written
        assert f"Which file {name} takes." in written
        assert not any(f"hat {other} does" in written for other in ("read_file", "write_file", "read") if other != name)
    assert [written for label, written in found if label == "message 4 (user)"] == ["And then?"]
    assert text.count("And then?") == 1


def test_a_call_is_its_messages() -> None:
    found = parts(TAGS)[1]
    assert [written for label, written in found if label == "message 3 (assistant), its call of 'read'"] == [
        "read",
        "a\\nb",
    ]


def test_of_a_message_that_is_cut_what_is_left_is_its() -> None:
    assert parts(WITHOUT_THOUGHTS)[1] == [
        ("the system message", "Be brief.\nBe kind."),
        ("message 2 (user)", "user"),
        ("message 3 (assistant)", "As you say."),
        ("message 4 (user)", "And then?"),
    ]


def test_a_message_that_is_written_twice_stands_in_two_places() -> None:
    found = parts(TWICE)[1]
    assert found[-2:] == [("message 4 (user)", "And then?")] * 2


def test_what_a_template_changes_is_nobodys() -> None:
    template = ChatTemplate({"default": SHOUTED}, {}, "here")
    text = template.render(MESSAGES)
    places = find_places(text, MESSAGES, [], template.render)
    assert places == ()  # "user" stands there, and is no message
    assert spot(text, places, text.index("BE KIND")).label == "the prompt"
