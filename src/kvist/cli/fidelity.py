"""`kvist fidelity`: what lossy caches change, against full precision."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError, install
from kvist.cli.options import Dtype, Json, Model, graceful_interrupt, note, print_json
from kvist.cli.process import Threads, prepare
from kvist.cli.run import INTERRUPTED

if TYPE_CHECKING:
    from kvist.evals.fidelity import FidelityReport

BUILT_IN = "built-in text"


def fidelity(
    model: Model = None,
    kv: Annotated[
        list[str] | None,
        typer.Option(
            "--kv", metavar="CODECS", help="As turbo4, k=int8,v=turbo4 or auto; several times. Default: the usual ones."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="int8|int4",
            help="Also packed weights (and a quantized file's own), over the cache in full precision; several times.",
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text in UTF-8; a built-in one when left out.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the text, in all; 4096 when left out.")] = None,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; the context, at most 2048, when left out.")
    ] = None,
    dtype: Dtype = None,
    plot: Annotated[Path | None, typer.Option(help="Draw quality against bytes into this PNG.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run a text over compressed caches and hold every prediction against the one over full precision: KL divergence,
    perplexity, same top token, and what became of the keys and values, at how many bytes per token."""
    prepare(threads)
    from rich.console import Console

    from kvist.evals.fidelity import DEFAULT_KV, LENGTH, TOKENS, run, windows
    from kvist.service.calibration import built_in_text
    from kvist.service.loaded import open_model
    from kvist.text.reading import read_text

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise KvistError(f"--plot needs matplotlib, which is missing; {install('plots')} brings it")
    words = None if text is None else read_text(text)
    base = open_model(model, dtype=dtype)
    packed = []
    if weights and base.model.is_packed:  # as the file has them; held against what they are decoded to
        packed.append(base)
        base = open_model(model, kv=base.layout.kv, weights=base.layout.kv)
    others = {choice: base.with_kv(choice) for choice in kv or (() if weights else DEFAULT_KV)}
    packed += [open_model(model, dtype=dtype, kv=base.layout.kv, weights=one) for one in weights or ()]
    words = built_in_text(base.tokenizer()) if words is None else words
    parts = windows(base, words, tokens or TOKENS, length or min(base.config.max_positions, LENGTH))
    with Console(stderr=True).status("fidelity", spinner="line") as status, graceful_interrupt() as interrupt:
        name = BUILT_IN if text is None else text.name
        report = run(base, others, name, parts, lambda what: status.update(f"fidelity · {what}"), interrupt, packed)
    if report is None:
        note("stopped before anything was measured")
        raise typer.Exit(INTERRUPTED)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    if text is None:
        note("the built-in text has also calibrated the model, which flatters it; --text takes one of yours")
    if plot is not None:
        _draw(report, plot)
    if interrupt.asked:
        note(f"stopped after {report.tokens:,} of {sum(map(len, parts)):,} tokens")
        raise typer.Exit(INTERRUPTED)


def _print(report: "FidelityReport") -> None:
    from kvist.base.tables import output, show

    console = output(180)
    for table in report.tables():
        show(console, table)
    for row in report.rows:
        if row.kv != row.choice:
            console.print(f"{row.kv}: {row.choice}")


def _draw(report: "FidelityReport", path: Path) -> None:
    from kvist.evals.tradeoff import plot

    if plot(report, path):
        note(f"picture: {path}")
    else:
        note("no picture: none of these caches changes anything, and the axis is logarithmic")
