"""Chat templates as a program that is not trusted: Jinja in a sandbox, as transformers sets it up, in a process of its
own.

What a template may use is what it may use in transformers: `tojson` that escapes nothing, `raise_exception`,
`strftime_now`, loop controls, and `{% generation %}`, which here changes nothing. What it may take is bounded by the
operating system, whatever it does: processor time for one rendering, and memory. `template_process.py` starts this file
as a program and asks it; it stands alone, so that a process starts fast and holds nothing of a model.

Messages either way are JSON with its length before it, eight bytes, the largest first.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_CHARACTERS = 1 << 24  # that one rendering may write


def environment() -> ImmutableSandboxedEnvironment:
    """A new environment for chat templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    made.globals["dict"] = _make_dict
    made.globals["namespace"] = _Namespace
    return made


def rendered(template: Template, variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a template writes: `text`; or `kind` and `message` of what it ran into."""
    pieces, written = [], 0
    try:
        for piece in template.generate(variables):
            written += len(piece)
            if written > MOST_CHARACTERS:
                return _failed("too much", f"writes more than {MOST_CHARACTERS:,} characters")
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return _failed("too much", "takes more memory than it may")
    except TemplateError as error:
        return _failed("refused", error)
    except RecursionError:
        return _failed("nested", "")
    except Exception as error:  # a template is a program: it can run into any of Python's errors
        return _failed("failed", error)


def compiled(sources: Mapping[str, str]) -> tuple[dict[str, Template], dict[str, Any]]:
    """The templates, and `{}`; or what is wrong with one: `message`, perhaps with `line`."""
    made, templates = environment(), {}
    for name, source in sources.items():
        try:
            templates[name] = made.from_string(source)
        except TemplateSyntaxError as error:
            return {}, {"line": error.lineno, "message": _one_line(error)}
        except Exception as error:  # Python compiles what Jinja writes, and has errors of its own
            return {}, {"message": _one_line(error)}
    return templates, {}


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer what is asked: first `sources` with the bounds `seconds` and `memory`, then `name` and `variables`, until
    nothing more comes."""
    begin = receive(source)
    if begin is None:
        return
    seconds = begin["seconds"]
    with contextlib.suppress(OSError, ValueError):  # where the system has no such bound, time is bounded all the same
        resource.setrlimit(resource.RLIMIT_AS, (begin["memory"], begin["memory"]))
    _allow(seconds)
    templates, problem = compiled(begin["sources"])
    send(sink, problem)
    while (asked := receive(source)) is not None:
        _allow(seconds)
        try:
            answer = json.dumps(rendered(templates[asked["name"]], asked["variables"])).encode()
        except MemoryError:
            answer = json.dumps(_failed("too much", "takes more memory than it may")).encode()
        _send_bytes(sink, answer)


def send(sink: BinaryIO, message: Mapping[str, Any]) -> None:
    """Write a message, all of it."""
    _send_bytes(sink, json.dumps(message).encode())


def receive(source: BinaryIO) -> dict[str, Any] | None:
    """The next message; None where there is none, or not all of it."""
    head = source.read(8)
    length = int.from_bytes(head)
    content = source.read(length) if len(head) == 8 else b""
    if len(head) < 8 or len(content) < length:
        return None
    value: dict[str, Any] = json.loads(content)
    return value


def _send_bytes(sink: BinaryIO, content: bytes) -> None:
    sink.write(len(content).to_bytes(8) + content)
    sink.flush()


def _allow(seconds: float) -> None:
    """From now on so much processor time; then the system ends this process, whatever it is about."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _failed(kind: str, error: Exception | str) -> dict[str, Any]:
    return {"kind": kind, "message": _one_line(error)[:2000]}


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


if __name__ == "__main__":
    # Who started this process ends it by closing its input. A Ctrl-C at the terminal is meant for that one alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin.buffer, sys.stdout.buffer)
