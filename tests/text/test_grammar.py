"""Answers drawn from random logits obey their grammar, whatever the vocabulary; without it they do not."""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest
import torch

from kvist.base.errors import RequestError
from kvist.runtime.request import Sampling
from kvist.runtime.sampler import Sampler
from kvist.service.calibration import TEXT
from kvist.text.call_grammar import CalledTool
from kvist.text.grammar import GrammarCompiler, Make
from kvist.text.response import FORMATS, ToolCallArguments, ToolCallBegin, ToolCallEnd
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_bytes_bpe, train_characters

EOS = "<|im_end|>"
WARM = Sampling(temperature=1.0)
EXTRA = 6  # the logits are wider than the vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = train_bytes_bpe(TEXT.read_text("utf-8"), 700)
    backend.add_special_tokens(["<|im_start|>", EOS, "<|python_tag|>", "[TOOL_CALLS]"])
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    return Tokenizer(backend, [backend.token_to_id(EOS)])


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + EXTRA)


def answer(
    tokenizer: Tokenizer, make: Make | None, seed: int, width: int, most: int = 2000, bias: Mapping[int, float] = {}
) -> tuple[str, bool]:
    """A text drawn from random logits, and whether it came to its end."""
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(
        Sampling(temperature=1.0, seed=seed, logit_bias=tuple(bias.items())), [], make() if make else None
    )
    ids: list[int] = []
    while len(ids) < most:
        token = sampler.draw(2 * torch.randn(width, generator=generator), len(ids))
        sampler.accept(token)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(ids, skip_special=False), True
        ids.append(token)
        if sampler.ended:
            return tokenizer.decode(ids, skip_special=False), True
    return tokenizer.decode(ids, skip_special=False), False


class Schemas:
    """Random schemas whose instances are bounded, so that every answer comes to an end."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.used: Counter[str] = Counter()

    def schema(self, depth: int = 0) -> dict[str, Any]:
        kinds = [self.string, self.integer, self.number, self.enum, self.constant, self.boolean, self.nullable]
        if depth < 3:
            kinds += [self.object, self.object, self.array, self.any_of, self.reference]
        kind = self.random.choice(kinds) if depth else self.random.choice([self.object, self.object, self.array])
        self.used[kind.__name__] += 1
        return kind(depth)

    def object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(["a", "name", "ü", "x y", 'quote"', "count", "items", "$id", "b\\c"], 4)
        properties = {name: self.schema(depth + 1) for name in names[: self.random.randint(0, 4)]}
        required = [name for name in properties if self.random.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def array(self, depth: int) -> dict[str, Any]:
        least = self.random.randint(0, 2)
        return {
            "type": "array",
            "items": self.schema(depth + 1),
            "minItems": least,
            "maxItems": least + self.random.randint(0, 2),
        }

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth + 1) for _ in range(self.random.randint(1, 3))]}

    def reference(self, depth: int) -> dict[str, Any]:
        name = f"one{len(self.used)}{self.random.randrange(10**9)}"
        return (
            {"$ref": f"#/$defs/{name}", "$defs": {name: self.schema(depth + 1)}} if depth == 9 else self.object(depth)
        )

    def string(self, depth: int) -> dict[str, Any]:
        pattern = self.random.choice([None, None, "^[a-f]{2,6}$", "^(ab|c)+x{1,3}$", r"^\d{4}-\d{2}$"])
        if pattern is not None and "+" not in pattern:
            return {"type": "string", "pattern": pattern}
        least = self.random.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self.random.randint(0, 12)}

    def integer(self, depth: int) -> dict[str, Any]:
        least = self.random.randint(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + self.random.choice([0, 1, 17, 5000])}

    def number(self, depth: int) -> dict[str, Any]:
        return {"enum": [self.random.randint(0, 99) / 4 for _ in range(3)]}

    def enum(self, depth: int) -> dict[str, Any]:
        return {"enum": self.random.sample(["red", "green", "", "a\nb", 3, None, True, "日本"], 3)}

    def constant(self, depth: int) -> dict[str, Any]:
        return {"const": self.random.choice(["only", 7, None, [1, "two"], {"k": "v"}])}

    def boolean(self, depth: int) -> dict[str, Any]:
        return {"type": "boolean"}

    def nullable(self, depth: int) -> dict[str, Any]:
        return {"type": ["integer", "null"], "minimum": 0, "maximum": 9}

    def rooted(self) -> dict[str, Any]:
        """A schema with definitions that are referred to."""
        schema = self.schema()
        shared = {"type": "object", "properties": {"inner": self.string(3)}, "required": ["inner"]}
        return {**schema, "$defs": {"shared": shared | {"additionalProperties": False}}}


def test_answers_to_five_hundred_random_schemas_are_valid(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    schemas = Schemas(1)
    width = tokenizer.vocab_size + EXTRA
    tokens = 0
    for seed in range(500):
        schema = schemas.rooted()
        text, ended = answer(tokenizer, grammars.json_schema(schema), seed, width)
        assert ended, (schema, text)
        assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)
        tokens += len(text)
    assert min(schemas.used.values()) > 20, schemas.used
    assert tokens > 20_000


def test_without_the_grammar_the_same_logits_give_no_json(tokenizer: Tokenizer) -> None:
    valid = 0
    for seed in range(30):
        text, _ = answer(tokenizer, None, seed, tokenizer.vocab_size, most=30)
        try:
            json.loads(text)
            valid += 1
        except ValueError:
            pass
    assert valid < 3


def test_an_object_is_an_object(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    closing = {tokenizer.encode(text, add_special=False)[0]: 8.0 for text in ('"', "}", "]", ",", ":")}
    for seed in range(20):
        text, ended = answer(tokenizer, grammars.json_object(), seed, tokenizer.vocab_size + EXTRA, bias=closing)
        assert ended
        assert isinstance(json.loads(text), dict)


def test_a_vocabulary_of_characters_without_an_end_ends_when_the_grammar_does() -> None:
    tokenizer = Tokenizer(train_characters('{}":, abcdefghij0123456789'))
    assert not tokenizer.eos_ids
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "bad": {"enum": ["cafe", "bed"]}},
        "required": ["a", "bad"],
        "additionalProperties": False,
    }
    for seed in range(20):
        text, ended = answer(tokenizer, grammars.json_schema(schema), seed, tokenizer.vocab_size, most=400)
        assert ended
        assert jsonschema_rs.is_valid(schema, json.loads(text))


def test_patterns_and_choices_hold(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    width = tokenizer.vocab_size + EXTRA
    for seed in range(10):
        text, ended = answer(tokenizer, grammars.regex("[a-c]{3,5}-[0-9]{2}"), seed, width)
        assert ended
        assert re.fullmatch("[a-c]{3,5}-[0-9]{2}", text)
        text, ended = answer(tokenizer, grammars.choice(["yes", "no", 'per"haps']), seed, width)
        assert (text, ended) in {("yes", True), ("no", True), ('per"haps', True)}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Oslo", "Bergen"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]


HELD = [CalledTool(tool["function"]["name"], tool["function"]["parameters"], True) for tool in TOOLS]


@pytest.mark.parametrize("name", [name for name, format in FORMATS.items() if format.calls is not None])
@pytest.mark.parametrize("parallel", [False, True])
def test_calls_that_are_required_are_read_back_and_valid(
    tokenizer: Tokenizer, grammars: GrammarCompiler, name: str, parallel: bool
) -> None:
    format = FORMATS[name]
    make = grammars.tool_calls(format, HELD, required=True, parallel=parallel)
    called: Counter[str] = Counter()
    several = 0
    for seed in range(12):
        text, ended = answer(tokenizer, make, seed, tokenizer.vocab_size + EXTRA)
        if not parallel:
            assert ended
        parser = format.parser("", TOOLS)
        parts = [*parser.push(text), *parser.finish()]
        begins = [part for part in parts if isinstance(part, ToolCallBegin)]
        several += len(begins) > 1
        assert len(begins) == 1 or parallel
        for begin in begins:
            called[begin.name] += 1
            if not any(isinstance(part, ToolCallEnd) and part.index == begin.index for part in parts):
                assert not ended
                continue
            arguments = "".join(p.text for p in parts if isinstance(p, ToolCallArguments) and p.index == begin.index)
            schema = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == begin.name)["parameters"]
            assert jsonschema_rs.is_valid(schema, json.loads(arguments)), text
    assert set(called) == {"look_up", "stop"}
    assert not parallel or several


def test_calls_within_text_are_held_to_their_schemas(tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
    format = FORMATS["hermes"]
    make = grammars.tool_calls(format, HELD, required=False, parallel=True)
    likely = {tokenizer.encode("<tool_call>", add_special=False)[0]: 6.0, next(iter(tokenizer.eos_ids)): 2.0}
    kinds: Counter[str] = Counter()
    for seed in range(20):
        text, _ = answer(tokenizer, make, seed, tokenizer.vocab_size + EXTRA, most=300, bias=likely)
        parser = format.parser("", TOOLS)
        parts = [*parser.push(text), *parser.finish()]
        kinds.update(type(part).__name__ for part in parts)
        for part in parts:
            if isinstance(part, ToolCallEnd):
                arguments = "".join(p.text for p in parts if isinstance(p, ToolCallArguments) and p.index == part.index)
                json.loads(arguments)
    assert kinds["ToolCallEnd"] > 10
    assert kinds["Content"] > 10


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "not": {"type": "string"}}, "not: no grammar holds"),
        (
            {"properties": {"a": {"type": "array", "uniqueItems": True}}},
            "properties.a.uniqueItems: no grammar holds an answer to this keyword",
        ),
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"enum": []}, "enum should be a list of values"),
        ({"type": "object", "properties": {"a": {"required": 5}}}, "properties.a.required should be a list of names"),
        ({"type": "object", "properties": []}, "properties should be schemas by name"),
        ({"items": 7}, "items should be a schema"),
        ({"type": "string", "minLength": -1}, "minLength should be a whole number"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no finite value"),
        (
            {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
            "no finite value",
        ),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_with_the_reason(
    grammars: GrammarCompiler, schema: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        grammars.json_schema(schema)


def test_schemas_are_bounded(grammars: GrammarCompiler) -> None:
    deep: dict[str, Any] = {}
    for _ in range(80):
        deep = {"type": "array", "items": deep}
    with pytest.raises(RequestError, match="64 levels"):
        grammars.json_schema(deep)
    with pytest.raises(RequestError, match="too large"):
        grammars.json_schema({"enum": ["x" * 100] * 20_000})
    with pytest.raises(RequestError, match="no JSON"):
        grammars.json_schema({"const": math.nan})


def test_a_grammar_is_compiled_once_and_each_sequence_has_its_own_state(
    grammars: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    one, two = grammars.json_object()(), grammars.json_object()()
    brace = tokenizer.encode("{", add_special=False)[0]
    one.accept(brace)
    rows = torch.zeros(2, tokenizer.vocab_size + EXTRA)
    one.forbid(rows[0])
    two.forbid(rows[1])
    assert not torch.equal(rows[0], rows[1])
    assert int((rows[1] == 0).sum()) < int((rows[0] == 0).sum())
    assert bool((rows[:, tokenizer.vocab_size :] == -math.inf).all()), "there are no such tokens"
    with pytest.raises(RequestError, match="grammar of this request failed"):
        two.accept(tokenizer.encode("x", add_special=False)[0])


def test_formats_without_calls_or_without_a_mark_say_so(grammars: GrammarCompiler) -> None:
    with pytest.raises(RequestError, match="no known way to call tools"):
        grammars.tool_calls(FORMATS["plain"], HELD, required=True, parallel=False)
    with pytest.raises(RequestError, match="not announced by a marker"):
        grammars.tool_calls(FORMATS["llama3-json"], HELD, required=False, parallel=False)
