"""Chat templates as a program that is not trusted: Jinja in a sandbox, as transformers sets it up, and with bounds.

What a template may use is what it may use in transformers: `tojson` that escapes nothing, `raise_exception`,
`strftime_now`, loop controls, and `{% generation %}`, which here changes nothing. What it may take is bounded: time,
what it writes, and the values that it multiplies. Memory in between is not; a checkpoint that is out to fill it can.
"""

import datetime
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 10.0  # of this thread's processor time, for one rendering
MOST_CHARACTERS = 1 << 24  # that one rendering may write
_LARGEST = 1 << 24  # items of a text or list made by multiplication, and bits of a power
_DEADLINE = "deadline of this rendering"  # no name in a template can be spelled like this
_EACH = "each item in time"


class TooMuch(Exception):
    """A template that takes more than it may. The message says of what."""


def environment() -> ImmutableSandboxedEnvironment:
    """A new environment for chat templates."""
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.filters[_EACH] = _each
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _make_dict
    made.globals["namespace"] = _Namespace
    return made


def pieces(template: Any, variables: Mapping[str, Any]) -> Iterator[str]:
    """What a template of such an environment writes. Raises `TooMuch`, or whatever the template runs into."""
    deadline, written = time.thread_time() + SECONDS, 0
    for piece in template.generate({**variables, _DEADLINE: deadline}):
        written += len(piece)
        if written > MOST_CHARACTERS:
            raise TooMuch(f"writes more than {MOST_CHARACTERS:,} characters")
        yield piece


class _Environment(ImmutableSandboxedEnvironment):
    """Looks at the time in each round of a loop and at each call: nothing else in a template can go on for long."""

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _EACH, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:  # as Jinja calls it
        _check_time(context)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiplication and powers, whose results may be out of all proportion to what they are made from."""
        if operator == "**":
            bits = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
            large = bits > _LARGEST
        else:
            lengths = [len(value) for value in (left, right) if isinstance(value, str | list | tuple)]
            times = [value for value in (left, right) if isinstance(value, int)]
            large = bool(lengths and times) and lengths[0] * times[0] > _LARGEST
        if large:
            raise TooMuch(f"makes a value larger than {_LARGEST:,} by {operator!r}")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training. It renders as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of Jinja's)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """A namespace without private attributes, which would stand beside Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:  # as templates call it
    return dict(*args, **kwargs)


@pass_context
def _each(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time(context)
        yield item


def _check_time(context: Context) -> None:
    deadline = context.get(_DEADLINE)
    if deadline is not None and time.thread_time() > deadline:
        raise TooMuch(f"takes longer than {SECONDS:g} s")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
