"""Calls of tools as a grammar: what a model of some format writes, held to the schemas of the tools.

In llguidance's dialect of Lark (its docs/syntax.md): `%json` takes a schema, `<[7]>` the special token of id 7, and a
`[lazy]` lexeme ends as soon as it can, so that text runs up to the first marker of a call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvist.base.errors import RequestError
from kvist.text.response_formats import CallSyntax

_TEXT = "TEXT: /(.|\\n)*/"


class CallGrammar:
    """`special`: the special tokens of a vocabulary, by their text. `whitespace`: the regex of what may stand between
    the tokens of JSON."""

    def __init__(self, syntax: CallSyntax, special: Mapping[str, int], whitespace: str) -> None:
        self._syntax = syntax
        self._special = special
        self._options = {"whitespace_pattern": whitespace}
        self._split = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._rules: list[str] = []

    def lark(self, tools: Sequence[Mapping[str, Any]], required: bool, parallel: bool) -> str:
        """The grammar of an answer. `required`: it is one call, or (`parallel`) several; otherwise text that may hold
        calls.

        `tools` as chat templates take them. Raises `RequestError` where calls are not announced by a marker, and so
        cannot be told from text."""
        syntax = self._syntax
        names = []
        for index, tool in enumerate(tools):
            self._call(f"call_{index}", tool["function"])
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

    def _call(self, name: str, function: Mapping[str, Any]) -> None:
        """Two rules: a call, and what follows its `before`."""
        syntax = self._syntax
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        arguments = f"{name}_arguments"
        if syntax.parameter is None:
            self._rules.append(f"{arguments}: {self._json(schema)}")
        else:
            self._parameters(arguments, schema, syntax.parameter)
        inner = f"{self._text(function['name'] + syntax.middle)} {arguments} {self._text(syntax.after)}"
        self._rules.append(f"{name}_rest: {inner}")
        self._rules.append(f"{name}: {self._text(syntax.before)} {name}_rest")

    def _parameters(self, name: str, schema: Mapping[str, Any], texts: tuple[str, str, str]) -> None:
        """Arguments that are tags of their own, in the order of the schema. A text stands as it is, up to its end
        tag."""
        before, between, after = texts
        required = set(schema.get("required") or ())
        parts = []
        for index, (key, value) in enumerate((schema.get("properties") or {}).items()):
            rule = f"{name}_{index}"
            opening = self._text(before + key + between)
            if isinstance(value, Mapping) and value.get("type") not in (None, "string"):
                self._rules.append(f"{rule}: {opening} {self._json(value)} {self._text(after)}")
            elif isinstance(value, Mapping) and value.get("enum"):
                words = " | ".join(self._text(str(word)) for word in value["enum"])
                self._rules.append(f"{rule}: {opening} ({words}) {self._text(after)}")
            else:
                self._rules.append(f"{rule}_text[suffix={json.dumps(after)}]: /(.|\\n)*/")
                self._rules.append(f"{rule}: {opening} {rule}_text")
            parts.append(rule if key in required else f"{rule}?")
        self._rules.append(f"{name}: {' '.join(parts) or self._text('')}")

    def _json(self, schema: Any) -> str:
        if isinstance(schema, Mapping):
            schema = {**schema, "x-guidance": self._options}
        return f"%json {json.dumps(schema)}"

    def _text(self, text: str) -> str:
        """`text` as the grammar has it: strings, and special tokens by their ids."""
        parts, place = [], 0
        for found in self._split.finditer(text):
            parts += [json.dumps(text[place : found.start()])] if found.start() > place else []
            parts.append(f"<[{self._special[found[0]]}]>")
            place = found.end()
        parts += [json.dumps(text[place:])] if place < len(text) else []
        return " ".join(parts) or '""'
