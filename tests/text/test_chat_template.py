"""Chat templates render what transformers renders, and can do nothing else."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from kvist.base.errors import ConfigError, RequestError
from kvist.text.chat import ChatTemplate
from kvist.text.template_process import BadTemplate, TemplateProcess
from kvist.text.training import train_bytes_bpe

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and tools and loop.first %}{%- continue %}{%- endif %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{%- generation %}{{- message.content if message.content else '' }}{%- endgeneration %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson(indent=1, sort_keys=true) }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
HEADERS = """\
{{ bos_token }}
{% for message in messages %}
    {% set ns = namespace(text=message['content'] | trim) %}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
        {{ raise_exception('what is a ' + message['role'] + '?') }}
    {%- endif -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{{ ns.text }}<|eot_id|>
{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""
INST = """\
{{- bos_token }}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message.role == 'user' %}{{- ' [INST] ' ~ message.content ~ ' [/INST]' }}
{%- else %}{{- ' ' ~ message.content ~ eos_token }}{%- endif %}
{%- endfor %}
"""
TURNS = """\
{{ bos_token }}{% for message in messages %}
{% set role = {'assistant': 'model'}.get(message.role, message.role) %}
{{ '<start_of_turn>' ~ role }}
{% if message.content is string %}{{ message.content | trim }}{% endif %}<end_of_turn>
{% if loop.last %}{% break %}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "inst": INST, "turns": TURNS}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": 'Finds "things" < others & ünïcödé',
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
PLAIN = [
    {"role": "user", "content": "  Is 1 < 2 & 'so' \"on\"?\n"},
    {"role": "assistant", "content": "Yes. 日本 <b>"},
    {"role": "user", "content": "Why?"},
]
CALLING = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look it up."},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I must.",
        "tool_calls": [
            {
                "type": "function",
                "id": "a",
                "function": {"name": "look_up", "arguments": {"what": "<ü>", "a": [1, None]}},
            }
        ],
    },
    {"role": "tool", "content": '{"found": "no"}', "tool_call_id": "a"},
]


def theirs(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bytes_bpe("a text to learn from", 300), **TOKENS)
    tokenizer.chat_template = template
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def ours(template: str) -> ChatTemplate:
    return ChatTemplate({"default": template}, TOKENS, "here")


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_transformers_renders_them(name: str, generation: bool) -> None:
    template = TEMPLATES[name]
    rendered = ours(template).render(PLAIN, add_generation_prompt=generation)
    assert rendered == theirs(template, PLAIN, add_generation_prompt=generation)


def test_tools_calls_and_reasoning_are_rendered_as_transformers_renders_them() -> None:
    rendered = ours(CHATML).render(CALLING, [TOOL])
    assert rendered == theirs(CHATML, CALLING, tools=[TOOL], add_generation_prompt=True)
    assert 'Finds \\"things\\" < others & ünïcödé' in rendered, "nothing is escaped but by JSON"


# What templates may use of Jinja, and what a loop knows of itself: the sandbox must not change it.
JINJA = """\
{%- macro said(message, last=false) %}<{{ message.role }}{{ '!' if last }}>{{ caller() if caller }}{% endmacro %}
{% for message in messages if message.role != 'system' %}
{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} {{ loop.revindex0 }}
{% if not loop.first %}{{ loop.previtem.role }}{% endif %}{% if not loop.last %}{{ loop.nextitem.role }}{% endif %}
{{ loop.cycle('a', 'b') }} {{ loop.changed(message.role) }} {{ said(message, loop.last) }}
{% call said(message) %}{{ message.content | upper }}{% endcall %}
{% else %}
none
{% endfor %}
{% for key, value in messages[0] | dictsort %}{{ key }}={{ value | tojson }};{% endfor %}
{% for part in [1, [2, [3]]] recursive %}{{ loop(part) if part is iterable else part }}:{{ loop.depth }}{% endfor %}
{% for x in [] %}x{% else %}empty{% endfor %}
{% set ns = namespace(found=[]) %}
{% for message in messages[::-1] %}
{% if message.role == 'user' and not ns.found %}{% set ns.found = ns.found + [loop.index0] %}{% continue %}{% endif %}
{% if loop.index > 2 %}{% break %}{% endif %}
{{ ns.found }}{{ message.content.split(' ')[-1].strip() }}{{ messages | map(attribute='role') | unique | join('|') }}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%s-%d' | format('a', 3) }}{{ 'ab' * 2 }}
{{ dict(a=1, b=[2]) | tojson(separators=(',', ':')) }}{{ {'ü': '<'} | tojson(ensure_ascii=true) }}{{ nothing }}
{{ 2 ** 9 }}{{ -7 // 2 }}
"""


@pytest.mark.parametrize("messages", [PLAIN, CALLING[:2], CALLING[:1]])
def test_jinja_is_what_it_is_in_transformers(messages: list[dict[str, Any]]) -> None:
    assert ours(JINJA).render(messages) == theirs(JINJA, messages, add_generation_prompt=True)


def test_what_a_message_lacks_is_rendered_as_transformers_renders_it() -> None:
    template = "{% for m in messages %}[{{ m.content }}{{ 'calls' if 'tool_calls' in m }}{{ m.thinking }}]{% endfor %}"
    nothing = {"role": "assistant", "content": None, "tool_calls": None, "reasoning_content": None}
    messages = [PLAIN[0], nothing, {"role": "assistant"}, {"role": "assistant", "reasoning": "Hm."}]
    assert ours(template).render(messages) == theirs(template, messages)
    assert ours(template).render(messages[1:]) == "[][][Hm.]"


@pytest.mark.parametrize("content", ["Because 1 is", "Because\n 1 is  \n", " ", "{{ 1 }} <|eot_id|> \\"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_last_message_is_continued_as_transformers_continues_it(name: str, content: str) -> None:
    messages = [*PLAIN[:1], {"role": "assistant", "content": content}]
    rendered = ours(TEMPLATES[name]).render(messages, continue_final=True)
    assert rendered == theirs(TEMPLATES[name], messages, continue_final_message=True)
    assert rendered.rstrip().endswith(content.strip())
    with pytest.raises(RequestError, match="only a last message of the assistant"):
        ours(TEMPLATES[name]).render(PLAIN, continue_final=True)


def test_variables_reach_the_template_and_cannot_stand_for_what_the_request_holds() -> None:
    template = ours("{{ 'thinks' if enable_thinking else 'does not' }} {{ bos_token }}")
    assert template.render(PLAIN, variables={"enable_thinking": True}) == "thinks <s>"
    assert template.render(PLAIN) == "does not <s>"
    with pytest.raises(RequestError, match="cannot be called 'messages'"):
        template.render(PLAIN, variables={"messages": []})


def test_what_a_template_refuses_is_said_to_the_client() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        ours(INST).render(PLAIN[1:])
    with pytest.raises(RequestError, match=r"what is a judge\?"):
        ours(HEADERS).render([{"role": "judge", "content": "no"}])
    with pytest.raises(RequestError, match="at least one message"):
        ours(INST).render([])
    with pytest.raises(RequestError, match="fails on these messages"):
        ours("{{ messages[0].content + 1 }}").render(PLAIN)
    with pytest.raises(RequestError, match="leaves out part of its content"):
        ours("{{ messages[-1].content[:3] }}").render(PLAIN[:2], continue_final=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '%s' | attr('format') }}{{ ''['__class__'] }}{{ (1).__class__.__base__ }}",
        "{% set n = namespace(_x=1) %}",
    ],
)
def test_a_template_reaches_nothing_of_the_program(source: str) -> None:
    try:
        rendered = ours(source).render(PLAIN)
    except RequestError:
        return
    assert "class" not in rendered
    assert "module" not in rendered


def test_without_the_sandbox_it_would() -> None:
    source = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert "class" in jinja2.Environment().from_string(source).render()


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{% set n = 9 %}{{ n ** (n ** n) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10 ** 8) %}{% endfor %}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(99999) %}{% set ns.s = ns.s * 2 %}{% endfor %}",
        "{% for i in range(9999) %}{{ messages | tojson }}{{ 'x' * 2000 }}{% endfor %}",
        "{% set n = range(9999) | list %}{% for i in n %}{{ n | reject('in', n) | list }}{% endfor %}",
        "{% set n = range(99999) | list %}{{ n | reject('in', n) | list | length }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ '%1000000000d' | format(7) }}",
        "{{ (messages * 5000) | map(attribute='content') | join('x' * 9999999) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ range(99999) | batch(10 ** 9, 'x') | list }}",
    ],
)
def test_a_template_that_takes_too_much_is_ended(source: str) -> None:
    process = TemplateProcess({"it": source, "other": "{{ messages[0].content }}"}, seconds=0.2, memory=1 << 28)
    answer = process.render("it", {"messages": list(PLAIN)})
    assert (answer.text, answer.kind in ("too much", "nested", "failed")) == (None, True)
    assert process.render("other", {"messages": list(PLAIN)}).text == PLAIN[0]["content"], "and another starts"


def test_what_compiling_takes_is_bounded_too() -> None:
    folded = "{% if 'x' | center(10 ** 7) | list | sort | reverse | list | sort | reverse | list %}{% endif %}"
    with pytest.raises(BadTemplate, match=r"takes longer than 0\.2 s"):
        TemplateProcess({"it": 200 * folded}, seconds=0.2, memory=1 << 32).compile()


def test_many_threads_render_at_once() -> None:
    template = ours("{% for i in range(2000) %}{% endfor %}{{ messages[0].content }}")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: template.render([{"role": "user", "content": str(n)}]), range(64)))
    assert found == [str(n) for n in range(64)]


def test_a_checkpoints_template_is_found_where_transformers_looks(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "one {{ bos_token }}{{ eos_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": ["END"]}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert (found.render(PLAIN), found.stops) == ("one <s></s>", ("END",))
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    found = ChatTemplate.load(tmp_path)
    assert found is not None
    assert (found.render(PLAIN), found.render(PLAIN, [TOOL])) == ("plain", "with tools")
    (tmp_path / "chat_template.jinja").write_text("the file")
    assert ChatTemplate.load(tmp_path).render(PLAIN) == "the file"  # type: ignore[union-attr]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("the file for tools")
    assert ChatTemplate.load(tmp_path).render(PLAIN, [TOOL]) == "the file for tools"  # type: ignore[union-attr]
    (tmp_path / "other.jinja").write_text("another")
    assert ChatTemplate.load(tmp_path, tmp_path / "other.jinja").render(PLAIN) == "another"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"chat_template": "{% for %}"}, "line 1"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, "with a 'default'"),
        ({"chat_template": 7}, "should be a text"),
        ({"chat_template": "x" * (1 << 21)}, "at most"),
        ({"chat_template": "line\n{{ messages | nothing }}"}, "line 2: No filter named 'nothing'"),
        # What Jinja lets pass and Python, which compiles what Jinja writes, does not.
        ({"chat_template": "{% break %}"}, "cannot be compiled: 'break' outside loop"),
        ({"chat_template": "{% for a in a %}" * 30 + "{% endfor %}" * 30}, "too many statically nested blocks"),
        ({"chat_template": "{% if a %}" * 200 + "{% endif %}" * 200}, "too many levels of indentation"),
        ({"chat_template": "{{ " + "1" * 5000 + " }}"}, "cannot be compiled: Exceeds the limit"),
        ({"chat_template": "{{ " + "(" * 5000 + ")" * 5000 + " }}"}, "cannot be compiled: maximum recursion depth"),
    ],
)
def test_a_template_that_is_none_names_its_file(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json") as refusal:
        ChatTemplate.load(tmp_path)
    assert said in str(refusal.value)


@pytest.mark.parametrize("stops", [7, [""], ["a", None], {}])
def test_stop_strings_that_are_none_name_their_file(tmp_path: Path, stops: Any) -> None:
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": stops}))
    with pytest.raises(ConfigError, match=r"generation_config\.json: stop_strings should be a text or a list"):
        ChatTemplate.load(tmp_path)


def test_what_a_conversation_holds_is_only_data() -> None:
    class Sly(str):
        def __html__(self) -> str:
            return "sly"

    assert ours("{{ messages[0].content }}").render([{"role": "user", "content": Sly("<plain>")}]) == "<plain>"
    with pytest.raises(RequestError, match="consists of JSON values"):
        ours("x").render([{"role": "user", "content": object()}])
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        ours("x").render([{"role": "user", "content": deep}])
