"""Response templates: the declarative description of how a model writes an answer.

The vocabulary is transformers' ("Response Parsing" in its documentation): fields with what opens and what closes them,
how their content is read, and how calls are made from it. A checkpoint may bring one in its tokenizer_config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import regex  # type: ignore[import-untyped]

from kvist.base.errors import ConfigError, TextError

_SECONDS = 1.0  # that a pattern may take on one text; a pattern that runs away takes for ever
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CALLS = "tool_calls"
_TEMPLATE_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_FIELD_KEYS = (
    {"open", "open_pattern", "close", "close_pattern", "content", "content_args"}
    | {"repeats", "join", "optional", "transform", "transform_each"}
)  # fmt: skip
PLACEHOLDER = regex.compile(r"\{(\w+(?:\.\w+)*)\}")  # in a transform: what of a call stands in its place
_PARSERS = ("text", "int", "float", "bool", "json", "xml-inline", "kv-lines")


class Status(Enum):
    NONE = auto()  # the text does not begin with the marker, and never will
    PARTIAL = auto()  # it may, once there is more of it
    FULL = auto()


@dataclass(frozen=True)
class Found:
    """`length`: characters that the marker takes. `may_grow`: more text could make it longer."""

    status: Status
    length: int = 0
    may_grow: bool = False
    captures: tuple[tuple[str, str], ...] = ()


_NONE, _PARTIAL = Found(Status.NONE), Found(Status.PARTIAL)


@dataclass(frozen=True)
class Marker:
    """What opens or closes a field: one of several texts, or a pattern (of the module `regex`, `.` matches all)."""

    literals: tuple[str, ...] = ()
    pattern: Any = None

    def at(self, text: str, start: int, final: bool = False) -> Found:
        """Whether `text` has the marker at `start`; `final`: no more text will come. Raises `TextError` for a pattern
        that takes too long."""
        if self.pattern is not None:
            return self._matched(text, start, final)
        whole = max((len(literal) for literal in self.literals if text.startswith(literal, start)), default=0)
        rest = text[start:]
        longer = not final and any(len(literal) > len(rest) and literal.startswith(rest) for literal in self.literals)
        if whole:
            return Found(Status.FULL, whole, longer)
        return _PARTIAL if longer else _NONE

    def last_end(self, text: str) -> int | None:
        """Where its last occurrence in `text` ends. Raises `TextError` as `at` does."""
        if self.pattern is None:
            ends = [at + len(literal) for literal in self.literals if (at := text.rfind(literal)) >= 0]
            return max(ends, default=None)
        try:
            return max((match.end() for match in self.pattern.finditer(text, timeout=_SECONDS)), default=None)
        except TimeoutError:
            raise self._too_slow() from None

    def _matched(self, text: str, start: int, final: bool) -> Found:
        try:
            match = self.pattern.match(text, start, timeout=_SECONDS)
            # Some match may take all of the text there is and more: only then does what comes next matter.
            open_ended = not final and self.pattern.fullmatch(text, start, partial=True, timeout=_SECONDS) is not None
        except TimeoutError:
            raise self._too_slow() from None
        if match is None:
            return _PARTIAL if open_ended else _NONE
        captures = tuple((name, value) for name, value in match.groupdict().items() if value is not None)
        return Found(Status.FULL, match.end() - start, open_ended, captures)

    def _too_slow(self) -> TextError:
        return TextError(f"the pattern {self.pattern.pattern!r} of a response template takes too long")


class Kind(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALLS = auto()


@dataclass(frozen=True)
class Field:
    """One region of an answer. `open` None: it is what lies between the others. `close` None: it runs to the end, or
    for calls to the end of their JSON. `strip`: whitespace next to other regions is no part of it."""

    name: str
    kind: Kind
    open: Marker | None
    close: Marker | None
    strip: bool
    join: str
    content: str
    content_args: Mapping[str, Any]
    transform: Any
    transform_each: bool


@dataclass(frozen=True)
class ResponseTemplate:
    """`anchor`: after its last occurrence in a prompt the model's own answer begins."""

    fields: tuple[Field, ...]
    anchor: Marker | None

    @classmethod
    def read(cls, spec: Any, where: str) -> "ResponseTemplate":
        """From its JSON object. Raises `ConfigError` that says what in `where` cannot be understood."""
        _check_keys(spec, _TEMPLATE_KEYS, where)
        if spec.get("version", 1) != 1:
            raise ConfigError(f"{where} is of version {spec['version']!r}; Kvist knows version 1")
        fields = spec.get("fields")
        if not isinstance(fields, Mapping) or not fields:
            raise ConfigError(f"{where} has no fields")
        read = tuple(_field(name, field, f"{where}, field {name!r}") for name, field in fields.items())
        if sum(field.open is None for field in read) > 1:
            raise ConfigError(f"{where} has more than one field that nothing opens")
        return cls(read, _marker(spec, "start_anchor", "start_anchor_pattern", where))

    @property
    def between(self) -> Field | None:
        """The field of what lies between the others."""
        return next((field for field in self.fields if field.open is None), None)


def _field(name: str, spec: Any, where: str) -> Field:
    _check_keys(spec, _FIELD_KEYS, where)
    content, arguments, join = spec.get("content", "text"), spec.get("content_args", {}), spec.get("join", "")
    _check_content(content, arguments, where)
    _check_transform(spec.get("transform"), where)
    if not isinstance(join, str):
        raise ConfigError(f"{where}: join should be a string")
    kind = Kind.CALLS if name == _CALLS else Kind.REASONING if name in _REASONING else Kind.CONTENT
    opening = _marker(spec, "open", "open_pattern", where)
    if kind is Kind.CALLS and opening is None:
        raise ConfigError(f"{where}: nothing opens it")
    return Field(
        name=name,
        kind=kind,
        open=opening,
        close=_marker(spec, "close", "close_pattern", where),
        strip=arguments.get("strip", True) is not False,
        join=join,
        content=content,
        content_args=arguments,
        transform=spec.get("transform"),
        transform_each=spec.get("transform_each", False) is True,
    )


def _check_content(parser: Any, arguments: Any, where: str) -> None:
    """Raises `ConfigError` for a parser that there is not, and for arguments that it could not be run with."""
    if parser not in _PARSERS:
        raise ConfigError(f"{where}: there is no content {parser!r}; there is {', '.join(_PARSERS)}")
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{where}: content_args should be an object")
    delimiters = arguments.get("string_delims", [])
    if not isinstance(delimiters, list) or not all(isinstance(pair, list) and _texts(pair, 2) for pair in delimiters):
        raise ConfigError(f"{where}: string_delims should be a list of pairs of texts, got {delimiters!r}")
    if not _texts([arguments.get("kv_sep", ":"), arguments.get("line_sep", "\n")], 2):
        raise ConfigError(f"{where}: kv_sep and line_sep should be texts")
    if parser == "xml-inline":
        pattern = compiled(arguments.get("tag_pattern"), f"{where}: tag_pattern")
        if "key" not in pattern.groupindex:
            raise ConfigError(f"{where}: tag_pattern has no group called key")
    inner = arguments.get("value_parser")
    if inner is not None:
        _check_keys(inner, {"name", "args"}, f"{where}: value_parser")
        _check_content(inner.get("name", "text"), inner.get("args", {}), f"{where}: value_parser")


def _texts(values: list[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(value, str) and value for value in values)


def _check_transform(transform: Any, where: str) -> None:
    """Raises `ConfigError` for a text that only in part is a placeholder."""
    if isinstance(transform, Mapping | list):
        for value in transform.values() if isinstance(transform, Mapping) else transform:
            _check_transform(value, where)
    elif isinstance(transform, str) and PLACEHOLDER.search(transform) and not PLACEHOLDER.fullmatch(transform):
        raise ConfigError(f"{where}: a placeholder is all of a text in transform, or none of it: {transform!r}")


def _marker(spec: Mapping[str, Any], literal_key: str, pattern_key: str, where: str) -> Marker | None:
    literals, pattern = spec.get(literal_key), spec.get(pattern_key)
    if literals is not None and pattern is not None:
        raise ConfigError(f"{where}: {literal_key} and {pattern_key} cannot both be given")
    if pattern is not None:
        return Marker(pattern=compiled(pattern, f"{where}: {pattern_key}"))
    if literals is None:
        return None
    listed = literals if isinstance(literals, list) else [literals]
    if not listed or not all(isinstance(literal, str) and literal for literal in listed):
        raise ConfigError(f"{where}: {literal_key} should be a text or a list of texts, got {literals!r}")
    return Marker(tuple(listed))


def compiled(pattern: Any, where: str) -> Any:
    """A compiled pattern. Raises `ConfigError`."""
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, TypeError) as error:
        raise ConfigError(f"{where} is no regular expression: {error}") from None


def _check_keys(spec: Any, known: set[str], where: str) -> None:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{where} should be a JSON object, got {type(spec).__name__}")
    if unknown := sorted(str(key) for key in spec if key not in known):
        raise ConfigError(f"{where} has keys that Kvist does not know: {', '.join(unknown)}")
