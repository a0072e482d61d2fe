"""Options that several verbs share, and the ways they print."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvist.base.errors import KvistError

Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A directory or a hub id; the bundled model when left out."),
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="fp32|bf16|fp16", help="Compute in this type; by default as the weights are stored."),
]
Kv = Annotated[
    str | None,
    typer.Option("--kv", metavar="CODEC", help="Codec of the cache; by default the model's own type."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="int8|int4|bf16",
        help="Pack the matrices into 8 or 4 bits, or decode a quantized file; default: as stored.",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(metavar="int8|bf16", help="What rows are rounded to before they meet packed weights; bf16 is slower."),
]
Merged = Annotated[
    Path | None,
    typer.Option("--adapter", metavar="DIR", help="A LoRA adapter in PEFT's format, merged into the weights."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]

CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the cache in this folder, too; by default one for all models."),
]
CacheDisk = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Keep the cache on disk, too, in at most so many bytes, as in 20GB."),
]


def print_json(value: Any) -> None:
    """One line, so that it can be read line by line."""
    print(json.dumps(value, allow_nan=False))


def note(text: str) -> None:
    """A quiet line beside the output: dimmed on a terminal, plain otherwise, always on stderr."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)


def numbers(text: str, option: str, example: str, least: int = 1) -> list[int]:
    """Numbers from `least` on between commas. Raises `KvistError` that names the option."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise KvistError(f"{option} takes numbers of tokens, as in {example}; got {text!r}")
    return found


@dataclass
class Interrupt:
    """Set by Ctrl-C; asked between two steps, so that no step is torn in the middle."""

    asked: bool = False

    def __call__(self) -> bool:
        return self.asked


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Within it the first Ctrl-C (or SIGTERM) only asks to stop; a second Ctrl-C interrupts at once."""
    interrupt = Interrupt()

    def ask(signum: int, frame: object) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
