"""What of a schema a grammar can hold.

Of a strict schema that is all, or it is refused with the reason. Of any other what cannot be held is left out, so that
the grammar allows more than the schema and never less, and whoever reads the answer checks the rest. What llguidance
can hold it says itself when it compiles; here is what it would find out too late, or not say in plain words.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvist.base.errors import RequestError
from kvist.text.schema import TYPES, changed, check_depth, endless, is_schema, target

_ANCHOR = re.compile(r"#[A-Za-z_][\w.-]*")
_MOST_PROBES = 2000  # schemas within one that are tried alone, so that the time is bounded
# What llguidance holds nothing of.
_NEVER = (
    *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef", "contentSchema"),
)
_REST = ("unevaluatedProperties", "unevaluatedItems")
# What is given up together, in the order in which it is tried: each alone at first, then one after the other. Without
# any of them a schema allows more; half of one of them could allow less.
_GROUPS: tuple[tuple[str, ...], ...] = (
    ("pattern",),
    ("format",),
    ("oneOf",),
    ("patternProperties", "additionalProperties"),
    ("minProperties", "maxProperties"),
    ("multipleOf",),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("prefixItems", "items", "additionalItems"),
    ("required",),
    ("enum",),
    ("const",),
    ("anyOf",),
    ("allOf",),
    ("properties", "patternProperties", "additionalProperties"),
    ("$ref",),
    ("type",),
)


class Prober(Protocol):
    """Asks llguidance about a schema alone."""

    def refusal(self, schema: Any) -> str | None:
        """Why it cannot be held; None: it can."""
        ...

    def accepts(self, schema: Any, value: Any) -> bool:
        """Whether a value follows it."""
        ...

    def goes_on(self, schema: Any, text: str) -> bool:
        """Whether anything may follow the beginning `text` of a value."""
        ...


def strict_schema(schema: Mapping[str, Any], prober: Prober) -> Mapping[str, Any]:
    """The schema, to be held to the letter. Raises `RequestError` that says what of it cannot be held."""
    check_depth(schema)
    _check_form(schema, "")
    if endless(schema):
        raise RequestError("no finite value can follow the schema: it must hold itself within itself")
    folded: Mapping[str, Any] = _folded(schema, prober)
    reason = prober.refusal(folded)
    if reason is not None:
        raise RequestError(reason)
    return folded


@dataclass
class Relaxing:
    """Takes from schemas what cannot be held. `dropped`: the keywords that were."""

    prober: Prober
    dropped: dict[str, None] = field(default_factory=dict)  # in their order
    _root: Any = None
    _probes: int = 0

    def schema(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """A schema that can be held, and that all values follow that follow this one."""
        try:
            check_depth(schema)
            whole = _with_nulls(schema)
            with contextlib.suppress(RequestError):
                return strict_schema(whole, self.prober)
            self._root = whole
            relaxed = self._relaxed(whole)
            if not endless(relaxed) and self.prober.refusal(relaxed) is None:
                return relaxed
        except RequestError:
            pass
        self.dropped = {"the schema as a whole": None}
        return {"type": "object"}

    def _relaxed(self, schema: Any, _: str = "") -> Any:
        if not isinstance(schema, Mapping):
            return True if not isinstance(schema, bool) else schema
        node = self._without(schema, [key for key, _ in _malformed(schema)])
        node = self._without(node, [key for key in _NEVER if key in node])
        reference = node.get("$ref")
        if reference is not None and target(reference, self._root) is None and not _ANCHOR.fullmatch(reference):
            node = self._without(node, ["$ref"])
        return self._held(changed(node, self._relaxed))

    def _held(self, node: dict[str, Any]) -> dict[str, Any]:
        """Of a schema, within which everything can be held, what can be held together."""
        if self._holds(node):
            return node
        for group in _GROUPS:
            if any(key in node for key in group):
                less = self._given_up(node, group)
                if self._holds(less):
                    self._drop(key for key in group if key in node)
                    return less
        for group in _GROUPS:
            if any(key in node for key in group):
                less = self._given_up(node, group)
                self._drop(key for key in group if key in node)
                node = less
                if self._holds(node):
                    break
        return node

    def _given_up(self, node: Mapping[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
        less = {key: value for key, value in node.items() if key not in group}
        if group == ("oneOf",):  # one of them at least is more than exactly one
            less["allOf"] = [*less.get("allOf", ()), {"anyOf": node["oneOf"]}]
            if len(less["allOf"]) == 1 and "anyOf" not in less:
                less["anyOf"] = less.pop("allOf")[0]["anyOf"]
        return less

    def _holds(self, node: Mapping[str, Any]) -> bool:
        """Whether it can be held alone. References count for anything: they are followed from the whole."""
        self._probes += 1
        if self._probes > _MOST_PROBES:
            raise RequestError("too many parts of the schema cannot be held")
        bare = {key: value for key, value in node.items() if key not in ("$defs", "definitions")}
        return self.prober.refusal(_cut(bare)) is None and not _stuck(bare, self.prober)

    def _without(self, node: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
        gone = set(keys)
        if gone & {"prefixItems", "items"}:
            gone |= {"prefixItems", "items", "additionalItems"} & node.keys()
        if gone & {"properties", "patternProperties"}:
            gone |= {"properties", "patternProperties", "additionalProperties"} & node.keys()
        self._drop(key for key in node if key in gone)
        return {key: value for key, value in node.items() if key not in gone}

    def _drop(self, keys: Any) -> None:
        self.dropped.update(dict.fromkeys(keys))


def _with_nulls(schema: Any, _: str = "") -> Any:
    """The same schema, in which null may be what OpenAPI calls `nullable`."""
    if not isinstance(schema, Mapping):
        return schema
    node = changed(schema, _with_nulls)
    if node.pop("nullable", None) is not True:
        return node
    outer = {key: node.pop(key) for key in ("$defs", "definitions") if key in node}
    return {"anyOf": [node, {"type": "null"}], **outer}


def _cut(schema: Any, _: str = "") -> Any:
    """Without references, and shallow: what lies within was looked at before."""
    if not isinstance(schema, Mapping):
        return schema
    return changed({key: value for key, value in schema.items() if key != "$ref"}, _cut)


def _stuck(node: Mapping[str, Any], prober: Prober) -> bool:
    """Whether all keys that `patternProperties` allows are properties already, while others are not allowed:
    llguidance would let a comma come, after which nothing can."""
    patterns, properties = node.get("patternProperties"), node.get("properties")
    if not patterns or not properties or node.get("additionalProperties") is not False:
        return False
    named = {
        "type": "object",
        "properties": {name: {"const": 0} for name in properties},
        "required": list(properties),
        "patternProperties": {pattern: {} for pattern in patterns},
        "additionalProperties": False,
    }
    written = "{" + "".join(f"{json.dumps(name, ensure_ascii=False)}:0," for name in properties)
    return prober.refusal(named) is None and not prober.goes_on(named, written + '"')


def _folded(schema: Any, prober: Prober, _: str = "") -> Any:
    """The same schema, without what says nothing, and where patterns that only match properties which are named are
    said of these."""
    if not isinstance(schema, Mapping):
        return schema
    said = {key: value for key, value in schema.items() if not _inert(key, value)}
    node = changed(said, lambda inner, where: _folded(inner, prober, where))
    if _stuck(node, prober):
        patterns = node.pop("patternProperties")
        node["properties"] = {
            name: _both(value, [patterns[pattern] for pattern in patterns if _matches(pattern, name, prober)])
            for name, value in node["properties"].items()
        }
    return node


def _inert(key: str, value: Any) -> bool:
    """Whether a keyword asks for nothing at this value."""
    return (key == "uniqueItems" and value is False) or (key in _REST and value in (True, {}))


def _both(schema: Any, more: list[Any]) -> Any:
    return {"allOf": [schema, *more]} if more else schema


def _matches(pattern: str, name: str, prober: Prober) -> bool:
    return prober.accepts({"type": "string", "pattern": pattern}, name)


# ---- the form of keywords


def _check_form(schema: Any, where: str) -> None:
    """Raises `RequestError` for the first keyword whose value is none that it can have."""
    if not is_schema(schema):
        raise RequestError(f"{where or 'the schema'} should be a schema, an object or a boolean")
    if isinstance(schema, Mapping):
        for key, wanted in _malformed(schema):
            place = f"{where}.{key}" if where else key
            raise RequestError(f"{place} should be {wanted}, got {str(schema[key])[:60]!r}")
        unheld = next((key for key in _NEVER if key in schema and not _inert(key, schema[key])), None)
        if unheld is not None:
            place = f"{where}.{unheld}" if where else unheld
            raise RequestError(f"{place}: no grammar holds an answer to this keyword")

        def inner(value: Any, place: str) -> Any:
            _check_form(value, f"{where}.{place}" if where else place)
            return value

        changed(schema, inner)


def _malformed(schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The keywords whose values have not the form that they should, each with what that is."""
    return [(key, _FORMS[key][1]) for key, value in schema.items() if key in _FORMS and not _FORMS[key][0](value)]


def _count(value: Any) -> bool:
    return _number(value) and value >= 0 and value == int(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _is_type(value: Any) -> bool:
    return (isinstance(value, str) and value in TYPES) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, str) and one in TYPES for one in value)
    )


def _schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_schema, value))


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_schema, value.values()))


_Form = tuple[Callable[[Any], bool], str]
_FORMS: dict[str, _Form] = {
    "type": (_is_type, f"one or several of {', '.join(TYPES)}"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values"),
    "required": (
        lambda value: isinstance(value, list) and all(map(_text, value)),
        "a list of names",
    ),
    "items": (lambda value: is_schema(value) or _schemas(value) or value == [], "a schema"),
    "uniqueItems": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("additionalProperties", "additionalItems", "not", "contains"), (is_schema, "a schema")),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (_schemas, "a list of schemas")),
    "prefixItems": (lambda value: _schemas(value) or value == [], "a list of schemas"),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), (_named, "schemas by name")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        (_count, "a whole number, not negative"),
    ),
    **dict.fromkeys(("minimum", "maximum"), (_number, "a number")),
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"), (lambda value: _number(value) or isinstance(value, bool), "a number")
    ),
    "multipleOf": (lambda value: _number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("pattern", "format", "$ref"), (_text, "a text")),
}
