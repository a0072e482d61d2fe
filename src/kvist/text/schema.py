"""JSON schemas as people and their tools write them: what they say of one value, read where it stands.

A reference means what it points at within its whole schema, and what stands beside it counts too. Only references
within the schema are followed: a server fetches nothing.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvist.base.errors import RequestError

Schema = Mapping[str, Any] | bool

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_MOST_DEPTH = 64  # of a schema
_MOST_REFERENCES = 32  # that lead from one to the next
_MOST_SHAPES = 64  # of the arguments of one tool
_ONE = ("additionalProperties", "items", "additionalItems", "unevaluatedItems", "unevaluatedProperties")
_ONE_TESTED = ("not", "if", "then", "else", "contains", "propertyNames", "contentSchema")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_depth(schema: Any) -> None:
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


def is_schema(value: Any) -> bool:
    return isinstance(value, Mapping | bool)


def changed(schema: Mapping[str, Any], change: Callable[[Any, str], Any]) -> dict[str, Any]:
    """A copy with each schema directly within replaced by `change(it, where it stands)`; data stays as it is."""
    result = dict(schema)
    for key, value in schema.items():
        if key in _ONE + _ONE_TESTED and is_schema(value):
            result[key] = change(value, key)
        elif key in (*_MANY, "items") and isinstance(value, list):
            result[key] = [change(item, f"{key}.{index}") for index, item in enumerate(value)]
        elif key in _NAMED and isinstance(value, Mapping):
            result[key] = {name: change(item, f"{key}.{name}") for name, item in value.items()}
    return result


def target(reference: Any, root: Any) -> Any:
    """What a reference points at within `root`; None where that is nothing, or elsewhere."""
    if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
        return None
    value = root
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value if is_schema(value) else None


def standalone(schema: Any, root: Any) -> Any:
    """The same schema with all of `root` that it refers to among its own `$defs`."""
    names: dict[str, str] = {}
    waiting: list[str] = []

    def moved(value: Any, _: str = "") -> Any:
        if not isinstance(value, Mapping):
            return value
        bare = {key: item for key, item in value.items() if key not in ("$defs", "definitions")}
        reference = bare.get("$ref")
        if isinstance(reference, str) and target(reference, root) is not None:
            if reference not in names:
                names[reference] = f"ref{len(names)}"
                waiting.append(reference)
            bare["$ref"] = f"#/$defs/{names[reference]}"
        return changed(bare, moved)

    result, defs = moved(schema), {}
    while waiting:
        reference = waiting.pop()
        defs[names[reference]] = moved(target(reference, root))
    return {**result, "$defs": defs} if defs else result


def kinds(schema: Any, root: Any, followed: int = 0) -> list[str] | None:
    """The JSON types that a value may have, in the order in which they are named; None: any."""
    if not isinstance(schema, Mapping) or followed > _MOST_REFERENCES:
        return None
    found: list[list[str] | None] = []
    declared = schema.get("type")
    if isinstance(declared, str | list):
        names = [declared] if isinstance(declared, str) else declared
        found.append([name for name in names if name in TYPES])
    given = _given(schema)
    if given is not None:
        found.append(list(dict.fromkeys(map(type_of, given))))
    if "$ref" in schema:
        found.append(kinds(target(schema["$ref"], root), root, followed + 1))
    found += [kinds(part, root, followed + 1) for part in _listed(schema, "allOf")]
    for union in ("anyOf", "oneOf"):
        parts = [kinds(part, root, followed + 1) for part in _listed(schema, union)]
        if parts and all(part is not None for part in parts):
            found.append(list(dict.fromkeys(kind for part in parts for kind in part or ())))
    result: list[str] | None = None
    for some in found:
        if some is not None:
            result = some if result is None else _common(result, some)
    if result is None:
        return ["object"] if "properties" in schema else ["array"] if "items" in schema else None
    return [*result, "null"] if schema.get("nullable") is True and "null" not in result else result


def literals(schema: Any, root: Any, followed: int = 0) -> list[Any] | None:
    """The values that are all there may be, by `enum` or `const`; None: there are others."""
    if not isinstance(schema, Mapping) or followed > _MOST_REFERENCES:
        return None
    given = _given(schema)
    if given is not None:
        return given
    if "$ref" in schema and (found := literals(target(schema["$ref"], root), root, followed + 1)) is not None:
        return found
    for part in _listed(schema, "allOf"):
        if (found := literals(part, root, followed + 1)) is not None:
            return found
    for union in ("anyOf", "oneOf"):
        parts = [literals(part, root, followed + 1) for part in _listed(schema, union)]
        if parts and all(part is not None for part in parts):
            return [value for part in parts for value in part or ()]
    return [None] if schema.get("type") == "null" else None


def parts_of(schema: Any, root: Any, followed: int = 0) -> list[Mapping[str, Any]] | None:
    """The schemas that a value must follow all at once, references and `allOf` taken apart. None: there are choices
    (`anyOf`, `oneOf`) among them, or what cannot be followed."""
    if not isinstance(schema, Mapping) or followed > _MOST_REFERENCES:
        return [] if schema is True else None
    if "anyOf" in schema or "oneOf" in schema:
        return None
    found: list[Mapping[str, Any]] = [schema]
    inner = [target(schema["$ref"], root)] if "$ref" in schema else []
    for part in [*inner, *_listed(schema, "allOf")]:
        more = parts_of(part, root, followed + 1)
        if more is None:
            return None
        found += more
    return found


def choices(schema: Any, root: Any, followed: int = 0) -> list[Any]:
    """The alternatives of a schema that is nothing but a choice, its own alternatives taken apart; else itself."""
    if not isinstance(schema, Mapping) or followed > _MOST_REFERENCES:
        return [schema]
    said = [key for key in ("$ref", "anyOf", "oneOf", "type", "enum", "const", "allOf", "properties") if key in schema]
    if said == ["$ref"] and (inner := target(schema["$ref"], root)) is not None:
        return choices(inner, root, followed + 1)
    if said in (["anyOf"], ["oneOf"]):
        return [one for part in _listed(schema, said[0]) for one in choices(part, root, followed + 1)]
    if said == ["allOf"] and len(alone := _listed(schema, "allOf")) == 1:
        return choices(alone[0], root, followed + 1)
    if said == ["type"] and isinstance(schema["type"], list):
        return [{**schema, "type": kind} for kind in schema["type"]]
    return [schema]


Shape = tuple[dict[str, Any], frozenset[str]]  # properties in their order, and the required among them


def shapes(schema: Any, root: Any, followed: int = 0) -> list[Shape]:
    """What an object may have: one entry for each way in which `anyOf` and `oneOf` can be gone. A property of several
    parts follows all of them."""
    if not isinstance(schema, Mapping) or followed > _MOST_REFERENCES:
        return [({}, frozenset())]
    properties, required = schema.get("properties"), schema.get("required")
    own: Shape = (
        dict(properties) if isinstance(properties, Mapping) else {},
        frozenset(name for name in required if isinstance(name, str)) if isinstance(required, list) else frozenset(),
    )
    factors = [[own]]
    if "$ref" in schema:
        factors.append(shapes(target(schema["$ref"], root), root, followed + 1))
    factors += [shapes(part, root, followed + 1) for part in _listed(schema, "allOf")]
    for union in ("anyOf", "oneOf"):
        if parts := _listed(schema, union):
            factors.append([shape for part in parts for shape in shapes(part, root, followed + 1)])
    combined = itertools.islice(itertools.product(*factors), _MOST_SHAPES + 1)
    found = [_merged(ways) for ways in combined]
    if len(found) > _MOST_SHAPES:
        raise RequestError(f"the arguments can have more than {_MOST_SHAPES} different shapes")
    return found


def property_schemas(schema: Any) -> dict[str, Any]:
    """Of each property that an object may have its schema; of one that alternatives know differently, a choice."""
    found: dict[str, list[Any]] = {}
    try:
        ways = shapes(schema, schema)
    except RequestError:  # too many to tell apart
        return {}
    for properties, _ in ways:
        for name, value in properties.items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: values[0] if len(values) == 1 else {"anyOf": values} for name, values in found.items()}


def endless(schema: Any) -> bool:
    """Whether no value is finite that follows the schema: it must hold itself within itself."""
    references: dict[str, Any] = {}

    def collect(value: Any, _: str = "") -> Any:
        if isinstance(value, Mapping):
            reference = value.get("$ref")
            inner = target(reference, schema)
            if inner is not None and reference not in references:
                references[str(reference)] = inner
                waiting.append(inner)
            changed(value, collect)
        return value

    waiting: list[Any] = [schema]
    while waiting:
        collect(waiting.pop())
    ending: set[str] = set()
    for _ in range(_MOST_DEPTH):
        new = {ref for ref in reversed(references) if ref not in ending and _ends(references[ref], references, ending)}
        if not new:
            return not _ends(schema, references, ending)
        ending |= new
    return False


def _ends(schema: Any, references: Mapping[str, Any], ending: set[str]) -> bool:
    """Whether a finite value follows the schema, if one does each of the references `ending`."""
    if not isinstance(schema, Mapping):
        return schema is not False
    reference = schema.get("$ref")
    if reference in references and reference not in ending:
        return False
    if _given(schema) is not None:
        return True
    within = list(_listed(schema, "allOf"))
    only = kinds(schema, None)
    required, properties = schema.get("required"), schema.get("properties")
    if only == ["object"] and isinstance(required, list) and isinstance(properties, Mapping):
        within += [properties[name] for name in required if isinstance(name, str) and name in properties]
    if only == ["array"] and isinstance(least := schema.get("minItems"), int) and least > 0:
        first = schema.get("prefixItems")
        within += first[:least] if isinstance(first, list) else [schema.get("items", True)]
    for union in ("anyOf", "oneOf"):
        parts = _listed(schema, union)
        if parts and not any(_ends(part, references, ending) for part in parts):
            return False
    return all(_ends(part, references, ending) for part in within)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: a number never is a boolean."""
    return one == other and json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _merged(ways: Sequence[Shape]) -> Shape:
    properties: dict[str, list[Any]] = {}
    for some, _ in ways:
        for name, value in some.items():
            properties.setdefault(name, []).append(value)
    required = frozenset(name for _, names in ways for name in names)
    return {name: parts[0] if len(parts) == 1 else {"allOf": parts} for name, parts in properties.items()}, required


def _given(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def type_of(value: Any) -> str:
    """The narrowest JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case list():
            return "array"
    return "object"


def _common(some: Sequence[str], others: Sequence[str]) -> list[str]:
    wide = {*others, *(["integer"] if "number" in others else [])}
    narrowed = ["integer" if kind == "number" and kind not in wide and "integer" in wide else kind for kind in some]
    return [kind for kind in narrowed if kind in wide]
