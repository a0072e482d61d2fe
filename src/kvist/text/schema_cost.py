"""What a JSON schema costs to compile, told before that is tried: some of it takes time out of all proportion.

Measured with llguidance 1.9: `multipleOf` takes time and memory in proportion to its divisor, which may be any number;
properties that may be left out, in proportion to the square of how many an object has.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from kvist.base.errors import RequestError

MOST_PARTS = 20_000  # schemas, keywords and values in one
MOST_OPTIONAL = 2_000  # properties of one object that may be left out
MOST_DIVISOR = 10_000  # of `multipleOf`, in units of its last digit


def check_cost(schema: Any) -> None:
    """Raises `RequestError` for a schema that would take too long to compile."""
    waiting, parts = [schema], 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if parts > MOST_PARTS:
            raise RequestError(f"the JSON schema is too large: at most {MOST_PARTS} parts of one are read")
        if isinstance(part, Mapping):
            _check_object(part)
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part


def _check_object(schema: Mapping[str, Any]) -> None:
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping):
        named = {name for name in required if isinstance(name, str)} if isinstance(required, Iterable) else set()
        optional = len(properties.keys() - named)
        if optional > MOST_OPTIONAL:
            raise RequestError(
                f"the JSON schema has an object with {optional} properties that are not required, and at most "
                f"{MOST_OPTIONAL} can be followed"
            )
    divisor = schema.get("multipleOf")
    if isinstance(divisor, int | float) and not isinstance(divisor, bool) and _steps(divisor) > MOST_DIVISOR:
        raise RequestError(
            f"the JSON schema has multipleOf {divisor!r:.40}, and it is followed up to {MOST_DIVISOR} in its last digit"
        )


def _steps(divisor: int | float) -> int:
    """The divisor in units of its last decimal digit, or of 1: 2500 for 2.5e3, 25 for 0.25."""
    value = Decimal(repr(divisor))
    if not value.is_finite():  # which is refused elsewhere
        return 0
    _, digits, exponent = value.normalize().as_tuple()
    return int("".join(map(str, digits))) * 10 ** max(int(exponent), 0)
