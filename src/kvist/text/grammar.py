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
from llguidance.gbnf_to_lark import gbnf_to_lark
from torch import Tensor

from kvist.base.errors import RequestError, TextError
from kvist.text.call_grammar import CallGrammar
from kvist.text.response import ResponseFormat
from kvist.text.tokenizer import Tokenizer

# What a model may put between the tokens of JSON. Without a bound it could do so for ever.
_WHITESPACE = r"[ \t\n\r]{0,24}"
_MOST_TEXT = 1 << 20  # characters of a grammar
_MOST_GBNF = 1 << 16
_MOST_DEPTH = 64  # of a schema
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
        _check_depth(schema)
        text = LLMatcher.grammar_from_json_schema(_dumped(schema), overrides={"whitespace_pattern": _WHITESPACE})
        return self._make(text, "the JSON schema")

    def regex(self, pattern: str) -> Make:
        """A text that all of the pattern matches."""
        return self._make(LLMatcher.grammar_from_regex(pattern), "the regular expression")

    def choice(self, texts: Sequence[str]) -> Make:
        """One of some texts."""
        if not texts or not all(texts):
            raise RequestError("a choice needs texts, and none may be empty")
        return self.lark("start: " + " | ".join(map(json.dumps, texts)))

    def lark(self, grammar: str) -> Make:
        """A context-free grammar in llguidance's dialect of Lark."""
        return self._make(LLMatcher.grammar_from_lark(grammar), "the grammar")

    def gbnf(self, grammar: str) -> Make:
        """A context-free grammar in llama.cpp's notation."""
        if len(grammar) > _MOST_GBNF:
            raise RequestError(f"the grammar is too large: at most {_MOST_GBNF:,} characters of GBNF are read")
        try:
            text = gbnf_to_lark(grammar)
        except Exception as error:  # plain ones, too, and RecursionError
            raise RequestError(f"the grammar is no GBNF that can be read: {_one_line(str(error))}") from None
        return self.lark(text)

    def tool_calls(
        self, format: ResponseFormat, tools: Sequence[Mapping[str, Any]], *, required: bool, parallel: bool
    ) -> Make:
        """Calls of `tools`, as chat templates take them, in the way of `format`. `required`: the answer is one call or,
        where `parallel`, several; otherwise it is text in which calls are held to their schemas once they begin.

        Raises `RequestError` where the format has no calls, or cannot tell them from text.
        """
        if format.calls is None:
            raise RequestError("this model has no known way to call tools: ask for JSON of a schema instead")
        for tool in tools:
            _check_depth(tool)
        calls = CallGrammar(format.calls, self._special, _WHITESPACE)
        grammar = calls.lark(tools, required, parallel)
        return self._make(LLMatcher.grammar_from_lark(grammar), "the schema of a tool")

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


def _dumped(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {error}") from None


def _check_depth(schema: Any) -> None:
    """Raises `RequestError` for a schema that is nested too deeply."""
    level = [schema]
    for _ in range(_MOST_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ())
        ]
        if not level:
            return
    raise RequestError(f"the JSON schema is nested more than {_MOST_DEPTH} levels deep")


def _one_line(error: str) -> str:
    return " ".join(error.split())[:300]
