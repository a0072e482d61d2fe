"""Calls of tools as a grammar: what a model of some format writes, held to the schemas of the tools.

In llguidance's dialect of Lark (its docs/syntax.md): `%json` takes a schema, `<[7]>` the special token of id 7, and a
`[lazy]` lexeme ends as soon as it can, so that text runs up to the first marker of a call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvist.base.errors import RequestError
from kvist.text.response_formats import CallSyntax
from kvist.text.schema import shapes, standalone
from kvist.text.tag_values import TagValues

_TEXT = "TEXT: /(.|\\n)*/"
_NOT_OF_TAGS = ("minProperties", "maxProperties", "patternProperties")


@dataclass(frozen=True)
class CalledTool:
    """A tool that may be called. `parameters`: a schema that can be held. `strict`: to the letter, or not at all; else
    what the grammar cannot hold in this way of calling is left to the client. `place`: of the schema in the request."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    place: str | None = None


class CallGrammar:
    """`special`: the special tokens of a vocabulary, by their text. `whitespace`: the regex of what may stand between
    the tokens of JSON."""

    def __init__(self, syntax: CallSyntax, special: Mapping[str, int], whitespace: str) -> None:
        self._syntax = syntax
        self._special = special
        self._options = {"whitespace_pattern": whitespace}
        self._split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._rules: list[str] = []

    def lark(self, tools: Sequence[CalledTool], required: bool, parallel: bool) -> str:
        """The grammar of an answer. `required`: it is one call, or (`parallel`) several; otherwise text that may hold
        calls.

        Raises `RequestError` where calls are not announced by a marker, and so cannot be told from text, and for what
        of a strict schema cannot be held in this syntax."""
        syntax = self._syntax
        names = []
        for index, tool in enumerate(tools):
            try:
                self._call(f"call_{index}", tool)
            except RequestError as error:
                raise RequestError(f"the tool {tool.name!r}: {error}", tool.place) from None
            names.append(f"call_{index}")
        self._rules.append(f"call: {' | '.join(names)}")
        more = f"({self._text(syntax.between)} call)*" if parallel else ""
        if required:
            self._rules.append(f"start: {self._text(syntax.first)} call {more} {self._text(syntax.last)}")
            return "\n".join(["%llguidance {}", *self._rules])
        opening, trigger = syntax.first + syntax.before, syntax.trigger
        if trigger is None or not opening.startswith(trigger):
            raise RequestError(
                "this model's calls are not announced by a marker, so they cannot be strict beside text: require a call"
            )
        self._rules += [f"call_rest: {' | '.join(f'{name}_rest' for name in names)}", _TEXT]
        if trigger in self._special:
            marker = f"TEXT <[{self._special[trigger]}]>"
        else:
            self._rules.append(f"marker[lazy]: TEXT {json.dumps(trigger)}")
            marker = "marker"
        rest = self._text(opening[len(trigger) :])
        self._rules.append(f"calls: {marker} {rest} call_rest {more} {self._text(syntax.last)}")
        self._rules.append(f"start: calls{'*' if parallel else '?'} ending\nending: TEXT")
        return "\n".join(["%llguidance {}", *self._rules])

    def _call(self, name: str, tool: CalledTool) -> None:
        """Two rules: a call, and what follows its `before`."""
        syntax = self._syntax
        arguments = f"{name}_arguments"
        if syntax.parameter is None:
            self._rules.append(f"{arguments}: {self._json(tool.parameters)}")
        else:
            self._parameters(arguments, tool, syntax.parameter)
        inner = f"{self._text(tool.name + syntax.middle)} {arguments} {self._text(syntax.after)}"
        self._rules.append(f"{name}_rest: {inner}")
        self._rules.append(f"{name}: {self._text(syntax.before)} {name}_rest")

    def _parameters(self, name: str, tool: CalledTool, texts: tuple[str, str, str]) -> None:
        """Arguments that are tags of their own, in the order of the schema; one rule for each shape that they may
        have."""
        before, between, after = texts
        schema = tool.parameters
        if tool.strict and (key := next((key for key in _NOT_OF_TAGS if key in schema), None)):
            raise RequestError(f"{key}: it cannot be held where arguments are tags, as this model writes them")
        values = TagValues(after, self._syntax.ending, tool.strict, self._json, self._text)
        rules: dict[str, str] = {}  # by the property and its schema
        ways = []
        for properties, required in shapes(schema, schema):
            parts = []
            for key, value in properties.items():
                said = json.dumps([key, value], sort_keys=True)
                if said not in rules:
                    rules[said] = f"{name}_{len(rules)}"
                    inner = values.rules(rules[said], standalone(value, schema), key)
                    self._rules += [f"{rules[said]}: {self._text(before + key + between)} {inner.start}", *inner.others]
                parts.append(rules[said] if key in required else f"{rules[said]}?")
            way = " ".join(parts) or self._text("")
            ways += [] if way in ways else [way]
        if ways == [self._text("")] and not tool.strict and schema.get("additionalProperties") is not False:
            other = values.rules(f"{name}_any", True, "")
            self._rules += [f"{name}_tag: {self._text(before)} /[^>\\n]+/ {self._text(between)} {other.start}"]
            self._rules += other.others
            ways = [f"{name}_tag*"]
        self._rules.append(f"{name}: {' | '.join(ways)}")

    def _json(self, schema: Any) -> str:
        whole = schema if isinstance(schema, Mapping) else {"allOf": [schema]}
        return f"%json {json.dumps({**whole, 'x-guidance': self._options})}"

    def _text(self, text: str) -> str:
        """`text` as the grammar has it: strings, and special tokens by their ids."""
        parts, place = [], 0
        for found in self._split.finditer(text):
            parts += [json.dumps(text[place : found.start()])] if found.start() > place else []
            parts.append(f"<[{self._special[found[0]]}]>")
            place = found.end()
        parts += [json.dumps(text[place:])] if place < len(text) else []
        return " ".join(parts) or '""'
