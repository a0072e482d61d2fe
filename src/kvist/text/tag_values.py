"""The value of an argument that is a tag of its own: a text as it is, anything else as JSON. As a grammar.

Which of the two a text is meant to be, its reader decides by the schema (`response_values.cast`): these rules allow
what that reads as a value of the schema, and nothing that it would read as another.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvist.base.errors import RequestError
from kvist.text.schema import choices, kinds, literals, parts_of

# How a value begins that is read as JSON if the schema allows its type: a text beside it must begin otherwise.
_FIRST = {"integer": r"\-0-9", "number": r"\-0-9", "array": r"\[", "object": r"\{"}
_WORDS = {"null": "null", "boolean": "true|false"}
_BARE = {"type", "title", "description", "default", "examples", "$comment", "deprecated"}
_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "email": r"[A-Za-z0-9_+\-]+(\.[A-Za-z0-9_+\-]+)*@[A-Za-z0-9][A-Za-z0-9\-]*(\.[A-Za-z]{2,})+",
}


@dataclass(frozen=True)
class Rules:
    """`start`: a value and the tag's end. `others`: the rules that it needs."""

    start: str
    others: tuple[str, ...] = ()


class TagValues:
    """`after`: the text that ends a tag; `ending`: the pattern of what would be taken for it. `strict`: what cannot be
    held is refused; else more is allowed. `as_json`, `as_text`: a schema, and a text, as the grammar has them."""

    def __init__(
        self, after: str, ending: str, strict: bool, as_json: Callable[[Any], str], as_text: Callable[[str], str]
    ) -> None:
        self._after = after
        self._ending = f"(?s:.*)({ending})(?s:.*)"
        self._strict = strict
        self._json = as_json
        self._text = as_text

    def rules(self, name: str, schema: Any, key: str) -> Rules:
        """The rules of a value, where references are to the schema's own `$defs`. Raises `RequestError` that names the
        property `key` for what is strict and cannot be held."""
        after = self._text(self._after)
        only, given = kinds(schema, schema), literals(schema, schema)
        if given is not None:
            words = [value if isinstance(value, str) else json.dumps(value) for value in given]
            fitting = [self._text(word) for word in dict.fromkeys(words) if word]
            if not fitting:
                raise RequestError(f"the property {key!r} has no value that could be written")
            return Rules(f"({' | '.join(fitting)}) {after}")
        if only is not None and "string" not in only:
            return Rules(f"{name}_json {after}", (f"{name}_json: {self._json(schema)}",))
        if only is None or only == ["string"]:
            return self._only_text(name, schema, key, () if only is None else ("string",))
        return self._mixed(name, schema, key, only)

    def _only_text(self, name: str, schema: Any, key: str, kind: tuple[str, ...]) -> Rules:
        limits = self._limits(schema, schema, key) if kind else []
        return self._lexeme(name, limits, "")

    def _mixed(self, name: str, schema: Any, key: str, only: list[str]) -> Rules:
        """A text or something else: alternatives of which each value follows one."""
        ways = choices(schema, schema)
        defs = {"$defs": schema["$defs"]} if isinstance(schema, Mapping) and "$defs" in schema else {}
        texts = [way for way in ways if (kinds(way, schema) or [""]) == ["string"]]
        others = [way for way in ways if (found := kinds(way, schema)) is not None and "string" not in found]
        if len(texts) + len(others) < len(ways) or len(texts) > 1:
            if self._strict:
                raise RequestError(f"the property {key!r} mixes texts and other values in a way that cannot be held")
            return self._lexeme(name, [], "")
        limits = self._limits(texts[0], schema, key)
        words = "|".join(word for kind, word in _WORDS.items() if kind in only)
        free = not limits and all(set(way) <= _BARE for way in others)
        complex_ways = [way for way in others if not set(kinds(way, schema) or ()) <= _WORDS.keys()]
        if free or not complex_ways or not self._strict:
            return self._lexeme(name, [] if not self._strict and complex_ways else limits, words)
        begun = [kind for way in complex_ways for kind in kinds(way, schema) or () if kind in _FIRST]
        first = "".join(dict.fromkeys(_FIRST[kind] for kind in begun))
        text = self._lexeme(name, [*limits, rf"([^\s{first}](?s:.*))?"], words)
        ways_of_json = self._json({"anyOf": complex_ways, **defs})
        return Rules(
            f"({text.start} | {name}_json {self._text(self._after)})", (*text.others, f"{name}_json: {ways_of_json}")
        )

    def _lexeme(self, name: str, limits: list[str], words: str) -> Rules:
        """A text up to the tag's end that all of `limits` match, or one of `words`."""
        inner = " & ".join(f"/{limit}/" for limit in limits) or "/(?s:.*)/"
        terminal = name.upper()
        also = f" | /{words}/" if words else ""
        return Rules(
            f"{name}_text",
            (
                f"{name}_text[suffix={json.dumps(self._after)}]: {terminal}",
                f"{terminal}: ({inner} & ~/{self._ending}/){also}",
            ),
        )

    def _limits(self, schema: Any, root: Any, key: str) -> list[str]:
        """What a text must match, all at once, as regular expressions of all of it."""
        parts = parts_of(schema, root)
        if parts is None:
            return self._unheld(key, "its alternatives")
        found = []
        for part in parts:
            least, most = part.get("minLength"), part.get("maxLength")
            if least is not None or most is not None:
                found.append(f"(?s:.{{{int(least or 0)},{'' if most is None else int(most)}}})")
            if "pattern" in part:
                whole = _whole(part["pattern"])
                found += self._unheld(key, "its pattern") if whole is None else [whole]
            if "format" in part:
                known = _FORMATS.get(part["format"])
                found += self._unheld(key, f"format {part['format']!r}") if known is None else [known]
        return found

    def _unheld(self, key: str, what: str) -> list[str]:
        if self._strict:
            raise RequestError(
                f"the property {key!r}: {what} cannot be held where arguments are tags, as this model writes them"
            )
        return []


def _whole(pattern: str) -> str | None:
    """A pattern that is searched for, as one that all of a text matches. None: its anchors cannot be told apart."""
    inner = pattern
    begins, ends = inner.startswith("^"), inner.endswith("$") and not inner.endswith("\\$")
    inner = inner[1 if begins else 0 : len(inner) - 1 if ends else None]
    depth, place, in_class = 0, 0, False
    while place < len(inner):
        character = inner[place]
        if character == "\\":
            if inner[place + 1 : place + 2] in ("b", "B", "A", "Z", "z"):
                return None
            place += 2
            continue
        if in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
            place += 1 if inner[place + 1 : place + 2] == "^" else 0
            place += 1 if inner[place + 1 : place + 2] == "]" else 0
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif character in "^$" or (character == "|" and depth == 0 and (begins or ends)):
            return None
        place += 1
    escaped = inner.replace("\n", "\\n")
    anything = "(?s:.*)"
    return f"{'' if begins else anything}({_slashed(escaped)}){'' if ends else anything}"


def _slashed(pattern: str) -> str:
    """A pattern with its slashes escaped, as they must be between two."""
    result, place = [], 0
    while place < len(pattern):
        pair = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        result.append("\\/" if pair == "/" else pair)
        place += len(pair)
    return "".join(result)
