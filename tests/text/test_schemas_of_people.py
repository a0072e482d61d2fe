"""Schemas as pydantic and zod write them: strict ones are held or refused by name, others never fail a request."""

import datetime
import enum
import json
import random
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from pydantic import BaseModel, ConfigDict, Field

from kvist.base.errors import RequestError
from kvist.text.call_grammar import CalledTool
from kvist.text.grammar import GrammarCompiler, Make
from kvist.text.response import FORMATS, ToolCallArguments, ToolCallEnd
from kvist.text.schema import endless, kinds, literals, property_schemas
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_bytes_bpe

END = "<|end|>"


class Color(enum.Enum):
    RED = "red"
    BLUE = "dark blue"


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lat: Annotated[float, Field(ge=-90, le=90)]
    name: str | None = None


class Cat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["dog"]
    tricks: Annotated[list[Annotated[str, Field(max_length=4)]], Field(max_length=2)] = []


class Tree(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Annotated[str, Field(max_length=3)]
    children: Annotated[list["Tree"], Field(max_length=2)] = []


class Everything(BaseModel):
    model_config = ConfigDict(extra="forbid")
    color: Color
    count: Annotated[int, Field(ge=1, le=99)] = 1
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    place: Place | None = None
    code: Annotated[str, Field(pattern="^[a-z]{2}-[0-9]{3}$")]
    short: Annotated[str, Field(min_length=1, max_length=5)] | None = None
    level: Literal[1, 2, 3] = 1
    flag: bool = False
    both: Annotated[int, Field(ge=0, le=9)] | Annotated[str, Field(max_length=3)] = 0
    pair: tuple[Annotated[int, Field(ge=0, le=9)], bool] | None = None
    day: datetime.date | None = None


class Loose(BaseModel):
    """What no grammar holds to the letter."""

    tags: set[str]
    scores: dict[str, int] = {}
    price: Decimal = Decimal(1)
    when: datetime.datetime | None = None
    id: UUID | None = None
    wait: datetime.timedelta | None = None
    password: Annotated[str, Field(json_schema_extra={"format": "password"})] = ""
    looked: Annotated[str, Field(json_schema_extra={"pattern": "^(?!x).*$"})] = ""
    anything: Any = None


# As zod's converters write them.
ZOD: dict[str, dict[str, Any]] = {
    "root reference": {
        "$ref": "#/definitions/Args",
        "definitions": {
            "Args": {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "format": "cuid"},
                    "url": {"type": "string", "format": "uri"},
                    "to": {"$ref": "#/definitions/Args/properties/id", "description": "as id"},
                },
                "required": ["id"],
                "additionalProperties": False,
            }
        },
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
    "record": {
        "type": "object",
        "properties": {"map": {"type": "object", "additionalProperties": {"type": "number"}}},
        "required": ["map"],
        "propertyNames": {"pattern": "^m"},
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    },
    "never and refined": {
        "type": "object",
        "properties": {
            "none": {"not": {}},
            "big": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
            "list": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
            "either": {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        },
        "required": ["big", "list"],
        "additionalProperties": False,
    },
    "conditional": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "if": {"properties": {"a": {"const": "x"}}},
        "then": {"required": ["b"]},
        "dependentRequired": {"b": ["a"]},
    },
    "openapi": {
        "type": "object",
        "properties": {"a": {"type": "string", "nullable": True}, "b": {"type": "integer", "format": "int64"}},
        "required": ["a"],
    },
    "overlapping patterns": {
        "type": "object",
        "patternProperties": {"^x": {"type": "integer"}, "y$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "malformed": {"type": "object", "properties": {"a": {"type": "string", "minLength": "1"}}, "required": 5},
}
VALUES: dict[str, list[Any]] = {
    "root reference": [{"id": "x", "url": "https://e.org", "to": "é\n"}],
    "record": [{"map": {"a": 1.5, "b c": -2}}],
    "never and refined": [{"big": 5, "list": ["a"], "either": 1.5}],
    "conditional": [{"a": "x", "b": "y"}, {}],
    "openapi": [{"a": "s", "b": 3}, {"a": None}],
    "overlapping patterns": [{"xa": 1, "by": 2}],
    "malformed": [{"a": ""}, {}],
}
LOOSE: list[dict[str, Any]] = [
    {"tags": ["a", "b"], "scores": {"x": 1}, "price": "1.5", "when": "2026-01-01T00:00:00Z"},
    {"tags": [], "id": "8b0d3f0c-53ba-4a4b-8d0d-0e6f0ad5d3b4", "wait": "P3D", "looked": "yes", "anything": [{"a": 1}]},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = train_bytes_bpe('{"name": [1, true, null], "b": "text"}\n  <parameter=x>\n</parameter>', 320)
    backend.add_special_tokens([END])
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(backend, [backend.token_to_id(END)])


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


class Walk:
    """Draws what a grammar allows, the shorter the later."""

    def __init__(self, tokenizer: Tokenizer, make: Make) -> None:
        self._tokenizer = tokenizer
        self._make = make
        spelled = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self._closing = np.array([bool(text) and text.strip(b' \n"}],:</>') == b"" for text in spelled])
        self._end = next(iter(tokenizer.eos_ids))

    def text(self, seed: int, most: int = 900) -> str | None:
        """An answer, or None where it does not end in time."""
        matcher: LLMatcher = self._make()._matcher
        generator, ids = np.random.default_rng(seed), []
        while len(ids) < most:
            packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            assert not matcher.is_error(), matcher.get_error()
            allowed = np.unpackbits(packed, bitorder="little", count=self._tokenizer.vocab_size).astype(bool)
            assert allowed.any(), "nothing may follow: " + self._tokenizer.decode(ids)
            closing = allowed & self._closing
            if allowed[self._end]:
                return self._tokenizer.decode(ids, skip_special=False)
            among = closing if closing.any() and generator.random() < 0.4 + len(ids) / most else allowed
            token = int(generator.choice(among.nonzero()[0]))
            matcher.consume_token(token)
            assert not matcher.is_error(), matcher.get_error()
            ids.append(token)
        return None

    def accepts(self, text: str) -> bool:
        matcher: LLMatcher = self._make()._matcher
        tokens = self._tokenizer.encode(text, add_special=False)
        if matcher.validate_tokens(tokens) < len(tokens):
            return False
        return bool(matcher.consume_tokens(tokens) and matcher.is_accepting())


def arguments_of(text: str, parameters: Mapping[str, Any]) -> Any:
    """What a client of Qwen3-Coder's form is told of the first call."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    parser = FORMATS["qwen3-coder"].parser("", tools)
    parts = [*parser.push(text), *parser.finish()]
    assert sum(isinstance(part, ToolCallEnd) for part in parts) == 1, text
    return json.loads("".join(part.text for part in parts if isinstance(part, ToolCallArguments)))


def written(value: Mapping[str, Any]) -> str:
    """A call as Qwen3-Coder's template writes it."""
    tags = [
        f"<parameter={key}>\n{item if isinstance(item, str) else json.dumps(item)}\n</parameter>\n"
        for key, item in value.items()
    ]
    return f"<tool_call>\n<function=f>\n{''.join(tags)}</function>\n</tool_call>"


@pytest.mark.parametrize("model", [Everything, Place, Cat, Dog, Tree])
def test_strict_schemas_of_pydantic_are_held_to_the_letter(
    tokenizer: Tokenizer, grammars: GrammarCompiler, model: type[BaseModel]
) -> None:
    schema = model.model_json_schema()
    walk, ended = Walk(tokenizer, grammars.json_schema(schema)), 0
    for seed in range(12):
        text = walk.text(seed)
        if text is not None:
            ended += 1
            jsonschema.validate(json.loads(text), schema)
    assert ended > 6


@pytest.mark.parametrize("model", [Everything, Place, Cat, Dog, Tree])
def test_strict_calls_in_tags_are_held_to_the_letter(
    tokenizer: Tokenizer, grammars: GrammarCompiler, model: type[BaseModel]
) -> None:
    schema = model.model_json_schema()
    tool = CalledTool("f", grammars.strict(schema), True)
    make = grammars.tool_calls(FORMATS["qwen3-coder"], [tool], required=True, parallel=False)
    walk, ended = Walk(tokenizer, make), 0
    for seed in range(12):
        text = walk.text(seed)
        if text is not None:
            ended += 1
            jsonschema.validate(arguments_of(text, schema), schema)
    assert ended > 6


SPACED = [
    {},
    {"indent": 2},
    {"indent": 4},
    {"indent": "\t"},
    {"separators": (",", ":")},
]


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (Loose.model_json_schema(), LOOSE),
        *((ZOD[name], VALUES[name]) for name in ZOD),
        ({"$defs": {"a": True}, "allOf": [{"$ref": "https://e.org/x"}]}, [{"anything": 1}]),
        ({"type": "object", "properties": {"a": {"items": [{"not": {}}], "additionalItems": False}}}, [{"a": [1]}]),
    ],
    ids=["pydantic", *ZOD, "elsewhere", "tuple"],
)
def test_what_cannot_be_held_is_left_out_and_named(
    tokenizer: Tokenizer, grammars: GrammarCompiler, schema: dict[str, Any], values: list[Any]
) -> None:
    with pytest.raises(RequestError):
        grammars.strict(schema) if schema != ZOD["openapi"] else grammars.strict({"not": {}})
    held, dropped = grammars.relaxed(schema)
    assert dropped or schema == ZOD["openapi"]
    assert "the schema as a whole" not in dropped
    tool = CalledTool("f", held, False)
    hermes = Walk(tokenizer, grammars.tool_calls(FORMATS["hermes"], [tool], required=True, parallel=False))
    tags = Walk(tokenizer, grammars.tool_calls(FORMATS["qwen3-coder"], [tool], required=True, parallel=False))
    for value in values:
        for spacing in SPACED:
            text = json.dumps(value, ensure_ascii=False, **spacing)  # type: ignore[arg-type]
            assert hermes.accepts(f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'), (text, held)
        assert tags.accepts(written(value)), (value, held)
    assert hermes.text(3) is not None or hermes.text(4) is not None, "and it comes to an end"


def test_what_says_nothing_is_let_pass(grammars: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": False}},
        "unevaluatedProperties": True,
        **dict.fromkeys(("title", "description", "$comment", "x-order"), "words"),
    }
    assert grammars.relaxed(schema)[1] == ()


def test_the_rest_of_a_schema_is_held_all_the_same(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    held, dropped = grammars.relaxed(ZOD["never and refined"])
    assert dropped == ("not", "uniqueItems", "oneOf")
    walk = Walk(tokenizer, grammars.json_schema(held))
    assert not walk.accepts('{"big": 0, "list": ["a"]}')
    assert not walk.accepts('{"big": 1, "list": []}')
    assert not walk.accepts('{"big": 1, "list": ["a"], "other": 1}')


def test_white_space_is_what_people_write(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    walk = Walk(tokenizer, grammars.json_object())
    assert walk.accepts('{ "a" : [ 1 ,\r\n\t\t2 ] }')
    for spaces in ("  ", "\n\n", "\t", " \n", "\n" + 65 * " "):
        assert not walk.accepts(f'{{{spaces}"a": 1}}'), repr(spaces)


@pytest.mark.parametrize(
    "text",
    [
        "a </function> b",
        "x</parameter>y",
        "<b>bold</b>\n</function> it says",
        "ends with </function>",
        "</parameter>",
        "line\n\n",
        "\n",
        "<function=g> is how it begins",
        "",
    ],
)
def test_a_text_may_hold_what_ends_calls(tokenizer: Tokenizer, grammars: GrammarCompiler, text: str) -> None:
    schema = {"type": "object", "properties": {"code": {"type": "string"}, "n": {"type": "integer"}}}
    call = written({"code": text, "n": 3})
    assert arguments_of(call, schema) == {"code": text, "n": 3}
    tool = CalledTool("f", grammars.strict(schema), True)
    make = grammars.tool_calls(FORMATS["qwen3-coder"], [tool], required=True, parallel=False)
    assert Walk(tokenizer, make).accepts(call)


def test_what_would_be_read_as_the_end_cannot_be_written(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"code": {"type": "string"}}}
    tool = CalledTool("f", grammars.strict(schema), True)
    make = grammars.tool_calls(FORMATS["qwen3-coder"], [tool], required=True, parallel=False)
    for text in ("a</parameter> </function>", "</parameter>\n<parameter=x>", "<b>\n</function>\n</tool_call>"):
        assert arguments_of(written({"code": text}), schema) != {"code": text}
        assert not Walk(tokenizer, make).accepts(written({"code": text}))


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, "[a", "[a"),
        ({"enum": ["1", 2, None]}, "1", "1"),
        ({"enum": ["1", 2, None]}, "2", 2),
        ({"enum": ["true", True]}, "true", "true"),
        ({"const": {"a": 1}}, '{"a": 1}', {"a": 1}),
        ({"type": ["number", "null"]}, "2.5", 2.5),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]}, "7", 7),
        ({"properties": {"a": {}}}, '{"a": 2}', {"a": 2}),
        ({}, "7", "7"),
        (True, "7", "7"),
        ({"$ref": "#/properties/other"}, "7", 7),
        ({"$ref": "#"}, '{"x": 1}', {"x": 1}),
        ({"$ref": "#/nowhere"}, "7", "7"),
        ({"type": "string", "const": "true"}, "true", "true"),
    ],
)
def test_a_text_is_what_its_schema_says(schema: Any, text: str, value: Any) -> None:
    whole = {"type": "object", "properties": {"x": schema, "other": {"type": "integer"}}}
    got = arguments_of(f"<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>", whole)["x"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a|b$"},
        {"type": "string", "pattern": "^a\\b"},
        {"type": "string", "format": "hostname"},
        {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^x"}]},
    ],
)
def test_what_tags_cannot_hold_is_refused_by_name(grammars: GrammarCompiler, schema: dict[str, Any]) -> None:
    whole = {"type": "object", "properties": {"it": schema}, "required": ["it"]}
    strict = [CalledTool("save", whole, True, "tools[2].function.parameters")]
    with pytest.raises(RequestError, match="the tool 'save': the property 'it'") as refusal:
        grammars.tool_calls(FORMATS["qwen3-coder"], strict, required=True, parallel=False)
    assert refusal.value.param == "tools[2].function.parameters"
    grammars.tool_calls(FORMATS["qwen3-coder"], [CalledTool("save", whole, False)], required=True, parallel=False)


def test_patterns_that_only_name_properties_are_said_of_these(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "multipleOf": 5}, "b": {"type": "integer"}},
        "patternProperties": {"^[ab]$": {"minimum": -10, "maximum": 10}},
        "required": ["a"],
        "additionalProperties": False,
    }
    walk = Walk(tokenizer, grammars.json_schema({"type": "object", "properties": {"x": schema}, "required": ["x"]}))
    texts = [text for seed in range(30) if (text := walk.text(seed)) is not None]
    for text in texts:
        jsonschema.validate(json.loads(text)["x"], schema)
    assert len({text for text in texts if "b" in json.loads(text)["x"]}) > 3


def test_random_schemas_are_held_or_refused_before_anything_is_drawn(
    tokenizer: Tokenizer, grammars: GrammarCompiler
) -> None:
    """Keywords thrown together: what is accepted never fails while it is drawn, and what comes fits; what is relaxed
    accepts whatever strictly fits."""
    source, held, refused = random.Random(5), 0, 0

    def some(depth: int) -> Any:
        leaf = source.choice(
            [
                {"type": "integer", "minimum": source.randint(-3, 3), "maximum": source.randint(0, 9)},
                {"type": "integer", "multipleOf": source.choice([2, 5, 0.5])},
                {"type": "string", "maxLength": source.randint(0, 4), "pattern": source.choice(["^a", "b$", "[0-9]"])},
                {"enum": source.sample(["a", 1, True, None, 1.5, "b c"], 3)},
                {"type": ["string", "null"], "maxLength": 3, "format": source.choice(["date", "ipv4", "nothing"])},
                {"const": source.choice([0, "x", {"a": [1]}])},
                {"$ref": "#/$defs/one"},
                {"not": {"type": "null"}},
                True,
            ]
        )
        if depth == 0:
            return leaf
        inner = [some(depth - 1) for _ in range(3)]
        return source.choice(
            [
                leaf,
                {
                    "type": "object",
                    "properties": dict(zip("abc", inner, strict=True)),
                    "required": source.sample("abc", source.randint(0, 2)),
                    "additionalProperties": False,
                    **source.choice([{}, {}, {"patternProperties": {source.choice(["^a$", "^[ab]", "c"]): inner[0]}}]),
                },
                {"type": "array", "items": inner[0], "maxItems": 2, "uniqueItems": source.choice([False, True])},
                {source.choice(["anyOf", "oneOf", "allOf"]): inner[:2]},
                {"type": "array", "prefixItems": inner[:2], "items": False},
            ]
        )

    for number in range(80):
        schema = {
            "type": "object",
            "properties": {"x": some(2)},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"one": {"type": "integer", "minimum": 0, "maximum": 9}},
        }
        relaxed, dropped = grammars.relaxed(schema)
        loose = Walk(tokenizer, grammars.json_schema(relaxed))
        try:
            walk = Walk(tokenizer, grammars.json_schema(schema))
        except RequestError:
            refused += 1
            assert dropped
            continue
        assert not dropped
        text = walk.text(number)
        if text is not None:
            held += 1
            jsonschema.validate(json.loads(text), schema)
            assert loose.accepts(text)
    assert held > 12
    assert refused > 12


def test_schemas_are_read_where_they_stand() -> None:
    root = {
        "$defs": {
            "a": {"$ref": "#/$defs/b", "description": "as b"},
            "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "loop": {"$ref": "#/$defs/loop"},
            "s/l~": {"const": "x"},
        },
        "allOf": [{"properties": {"p": {"$ref": "#/$defs/a"}}}, {"$ref": "#/$defs/more"}],
    }
    assert kinds({"$ref": "#/$defs/a"}, root) == ["integer", "null"]
    assert kinds({"$ref": "#/$defs/loop"}, root) is None
    assert literals({"$ref": "#/$defs/s~1l~0"}, root) == ["x"]
    assert property_schemas(root) == {"p": {"$ref": "#/$defs/a"}}
    assert kinds({"allOf": [{"type": "number"}, {"type": ["integer", "string"]}]}, root) == ["integer"]
    assert endless({"$ref": "#/$defs/loop", **root})
    assert not endless(Tree.model_json_schema())
