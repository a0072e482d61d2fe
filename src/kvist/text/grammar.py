"""What an answer must be: JSON, JSON of a schema, calls of tools, a regular expression, one of some texts.

llguidance says, token by token, what may come next. A grammar is compiled once and kept; each sequence has a matcher of
its own, which is a copy of the compiled one.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark, is_lark_syntax
from torch import Tensor

from kvist.base.errors import RequestError, TextError
from kvist.text.call_grammar import CalledTool, CallGrammar
from kvist.text.relaxing import Relaxing, strict_schema
from kvist.text.response import ResponseFormat
from kvist.text.schema import check_depth, kinds, shapes
from kvist.text.schema_cost import check_cost
from kvist.text.tokenizer import Tokenizer

# What may stand between the tokens of JSON, as people and their programs write it: nothing, a space, or a line break
# and the indentation of what follows. Without a bound a model could go on with it for ever.
_WHITESPACE = r"( |\r?\n( {0,64}|\t{0,16}))?"
_MOST_TEXT = 1 << 20  # characters of a grammar
_MOST_GBNF = 1 << 13  # characters of one, whose reader takes time as their square
_KEPT = 64  # compiled grammars
_LIMITS = LLParserLimits(max_grammar_size=500_000, initial_lexer_fuel=1_000_000, verbose_errors=False)

Make = Callable[[], "TokenGrammar"]


class TokenGrammar:
    """Which tokens one sequence may draw: see `runtime.request.Grammar`.

    `ends`: the sequence can draw an end-of-text token; otherwise it ends as soon as the grammar lets it.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: bool) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends

    def forbid(self, logits: Tensor) -> None:
        """Set to -inf, in place, the logits `[V]` float32 of all tokens that may not come next.

        Raises `RequestError` when the grammar turns out too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(packed, bitorder="little", count=self._vocab_size)
        logits.numpy()[allowed == 0] = -math.inf  # by one thread: waking others takes longer

    def accept(self, token: int) -> None:
        """Take note of a token that was drawn. Raises `RequestError` for one that was not allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped() or (not self._ends and self._matcher.is_accepting()))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar of this request failed: {_one_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Grammars over one vocabulary. `vocab_size`: the width of the logits, which may be more than the tokenizer has.

    Nothing is built before the first grammar is asked for. May be used from any thread.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def json_object(self) -> Make:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Make:
        """JSON that the schema allows. Raises `RequestError` that says what of it is not supported."""
        _check_size(schema)
        held = strict_schema(schema, self._prober)
        self._check_spelled(held)
        return self._make(_json_grammar(held), "the JSON schema")

    def regex(self, pattern: str) -> Make:
        """A text that all of the pattern matches."""
        return self._make(LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def choice(self, texts: Sequence[str]) -> Make:
        """One of some texts."""
        if not texts or not all(texts):
            raise RequestError("a choice needs texts, and none may be empty")
        return self.lark("start: " + " | ".join(map(json.dumps, texts)))

    def lark(self, grammar: str) -> Make:
        """A context-free grammar in llguidance's dialect of Lark, or in GBNF."""
        if not is_lark_syntax(grammar) and len(grammar) > _MOST_GBNF:
            raise RequestError(
                f"a grammar in GBNF has at most {_MOST_GBNF:,} characters, and this one {len(grammar):,}"
            )
        try:
            text = any_to_lark(grammar)
        except RecursionError:
            raise RequestError("the grammar cannot be read: it is nested too deeply") from None
        except Exception as error:  # whatever a reader of grammars may raise
            raise RequestError(f"the grammar cannot be read: {_one_line(str(error))}") from None
        return self._make(LLMatcher.grammar_from_lark(text), "the grammar")

    def strict(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema to which arguments are held to the letter. Raises `RequestError` that says what cannot be held."""
        _check_size(schema)
        return strict_schema(schema, self._prober)

    def relaxed(self, schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """A schema that can be held and allows all that this one does, and the keywords that were given up for it."""
        try:
            _check_size(schema)
        except RequestError:
            return {"type": "object"}, ("the schema as a whole",)
        relaxing = Relaxing(self._prober)
        return relaxing.schema(schema), tuple(relaxing.dropped)

    def tool_calls(
        self, format: ResponseFormat, tools: Sequence[CalledTool], *, required: bool, parallel: bool
    ) -> Make:
        """Calls of `tools` in the way of `format`. `required`: the answer is one call or, where `parallel`, several;
        otherwise it is text in which calls are held to their schemas once they begin.

        Raises `RequestError` where the format has no calls, or cannot tell them from text.
        """
        if format.calls is None:
            raise RequestError("this model has no known way to call tools: ask for JSON of a schema instead")
        calls = CallGrammar(format.calls, self._special, _WHITESPACE)
        syntax = format.calls
        for tool in tools:
            written = syntax.first + syntax.before + tool.name + syntax.middle + syntax.after
            self._check_spelled(tool.parameters, written + ("{}" if syntax.parameter is None else ""))
        return self._make(LLMatcher.grammar_from_lark(calls.lark(tools, required, parallel)), "the schema of a tool")

    def _check_spelled(self, schema: Mapping[str, Any], beside: str = "") -> None:
        """Raises `RequestError` where a vocabulary of characters lacks some that JSON of this schema, or what is
        written `beside` it, needs."""
        missing = self._tokenizer.missing(beside + _needed(schema))
        if missing:
            raise RequestError(
                f"this model cannot write JSON of this schema: its vocabulary is {self._tokenizer.vocab_size} "
                f"characters, and {' '.join(map(repr, missing[:8]))} are not among them"
            )

    @cached_property
    def _prober(self) -> "_Prober":
        return _Prober()

    @cached_property
    def _special(self) -> dict[str, int]:
        texts = {token_id: self._tokenizer.token(token_id) for token_id in self._tokenizer.special_ids}
        return {text: token_id for token_id, text in texts.items() if text}

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """The vocabulary as llguidance takes it. Where no token ends a text, one is made up behind the others; the
        logits do not reach it."""
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size)
        return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=self._end_ids)

    @cached_property
    def _end_ids(self) -> list[int]:
        return sorted(index for index in self._tokenizer.eos_ids if index < self._vocab_size) or [self._vocab_size]

    def _make(self, grammar: str, what: str) -> Make:
        """Compile, or find, a grammar. Raises `RequestError` that says what is wrong with `what`."""
        if len(grammar) > _MOST_TEXT:
            raise RequestError(f"{what} is too large: at most {_MOST_TEXT:,} characters are read")
        key = hashlib.sha256(grammar.encode()).hexdigest()
        matcher = self._compiled.pop(key, None)
        if matcher is None:
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise RequestError(f"{what} cannot be followed: {_one_line(matcher.get_error())}")
        self._compiled[key] = matcher
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        ends = self._end_ids[0] < self._vocab_size
        return lambda: TokenGrammar(matcher.deep_copy(), self._vocab_size, ends)


class _Vocabulary:
    """What llguidance asks of a tokenizer; the names are its own."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        # A token without bytes is never allowed.
        self.tokens = [tokenizer.token_bytes(index) for index in range(vocab_size)]
        self.special_token_ids = sorted(index for index in tokenizer.special_ids if index < vocab_size)
        ends = sorted(index for index in tokenizer.eos_ids if index < vocab_size)
        if not ends:
            self.tokens.append(b"<end of text>")
            self.special_token_ids.append(vocab_size)
        self.eos_token_id = ends[0] if ends else vocab_size

    def __call__(self, text: str | bytes) -> list[int]:
        try:
            return self._tokenizer.encode(text if isinstance(text, str) else text.decode(), add_special=False)
        except (TextError, UnicodeDecodeError):  # it asks for hints only, and a vocabulary of characters may lack some
            return []


class _Prober:
    """Tries schemas alone, over single bytes. See `relaxing.Prober`."""

    def __init__(self) -> None:
        self._bytes = LLTokenizer("byte")

    def refusal(self, schema: Any) -> str | None:
        matcher = self._matcher(schema)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return _one_line(matcher.get_error()) if matcher.is_error() else None

    def accepts(self, schema: Any, value: Any) -> bool:
        matcher = self._matcher(schema)
        tokens = self._bytes.tokenize_str(json.dumps(value, ensure_ascii=False))
        if matcher.is_error() or matcher.validate_tokens(tokens) < len(tokens):
            return False
        return bool(matcher.consume_tokens(tokens) and matcher.is_accepting())

    def goes_on(self, schema: Any, text: str) -> bool:
        matcher = self._matcher(schema)
        if matcher.is_error() or not matcher.consume_tokens(self._bytes.tokenize_str(text)):
            return False
        matcher.compute_bitmask()
        return not matcher.is_error()

    def _matcher(self, schema: Any) -> LLMatcher:
        return LLMatcher(self._bytes, _json_grammar(schema), log_level=0, limits=_LIMITS)


def _json_grammar(schema: Any) -> str:
    whole = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
    return LLMatcher.grammar_from_json_schema(_dumped(whole), overrides={"whitespace_pattern": _WHITESPACE})


def _needed(schema: Any) -> str:
    """The characters without which no JSON of a schema can be written: of its brackets, its required keys, numbers."""
    kind = kinds(schema, schema) or []
    if len(kind) != 1:
        return ""
    if kind[0] == "string":
        return '"'
    if kind[0] == "array":
        return "[]"
    if kind[0] != "object":
        return ""
    properties, required = shapes(schema, schema)[0]
    keys = "".join(json.dumps(name, ensure_ascii=False) for name in properties if name in required)
    return "{}" + (keys + ":" + "," * (len(required) > 1) if keys else "")


def _check_size(schema: Mapping[str, Any]) -> None:
    check_depth(schema)
    check_cost(schema)
    if len(_dumped(schema)) > _MOST_TEXT:
        raise RequestError(f"the JSON schema is too large: at most {_MOST_TEXT:,} characters are read")


def _dumped(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {error}") from None


def _one_line(error: str) -> str:
    return " ".join(error.split())[:300]
