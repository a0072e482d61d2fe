"""`kvist bench`: measurements beside others, in one run on one machine."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.cli.options import Json, Model, note, print_json

if TYPE_CHECKING:
    from kvist.bench.report import Report

app = typer.Typer(help="Measure, beside others, in one run on one machine.", no_args_is_help=True)

ATTENTION_SHAPES = "smollm2-135m,qwen2.5-0.5b,llama-3.2-1b,llama-3.1-8b"
CACHE_SHAPES = "nanogpt-0.2m,smollm2-135m"

Shapes = Annotated[str, typer.Option("--shape", metavar="NAME,...", help="Standard shapes.")]
Contexts = Annotated[str, typer.Option("--context", metavar="N,...", help="Tokens in the cache.")]


@app.command()
def attention(
    shape: Shapes = ATTENTION_SHAPES,
    context: Contexts = "16384",
    kv: Annotated[str, typer.Option("--kv", metavar="fp32|bf16|fp16", help="The type of keys and values.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved measurements of each.")] = 11,
    as_json: Json = False,
) -> None:
    """Decode and prefill attention over pages beside PyTorch's, and the memory's read bandwidth."""
    import os

    from kvist.bench.attention import run

    report = run(shape.split(","), _numbers(context), kv, rounds, os.environ.get("KVIST_OPS") or None)
    _print(report, as_json)


@app.command()
def cache(
    model: Model = None,
    shape: Shapes = CACHE_SHAPES,
    context: Contexts = "64,256,1024,4096,16384",
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("cache.png"),
    as_json: Json = False,
) -> None:
    """Tokens per second with and without the cache, for a MODEL or for standard shapes with random weights."""
    from rich.console import Console

    from kvist.bench import cache as bench
    from kvist.bench.models import random_model
    from kvist.service.loaded import open_model

    if model is not None:
        models = [(model, open_model(model))]
    else:
        models = [
            (name, random_model(name, "fp32" if name.startswith("nanogpt") else "bf16")) for name in shape.split(",")
        ]
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = bench.run(models, _numbers(context), observe=lambda what: status.update(f"measuring {what}"))
    _print(report, as_json)
    if importlib.util.find_spec("matplotlib") is None:
        note("no picture: matplotlib is missing; pip install 'kvist[plots]' brings it")
        return
    bench.plot(report, plot)
    note(f"picture: {plot}")


def _print(report: "Report", as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        print_json(report.to_json())
    else:
        report.print(Console(width=None if sys.stdout.isatty() else 140))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise KvistError(f"--context takes numbers of tokens, as in 1024,4096; got {text!r}")
    return numbers
