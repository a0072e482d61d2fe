"""`kvist eval`: what a model still knows through its cache, by codec."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError, install
from kvist.cli.options import Json, Model, note, numbers, print_json
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvist.evals.needle import NeedleReport
    from kvist.evals.recall import RecallReport

app = typer.Typer(help="Measure what a model still knows through its cache, by codec.", no_args_is_help=True)

RECALL_NAME = "kvist-recall"

Kvs = Annotated[
    list[str] | None,
    typer.Option("--kv", metavar="CODEC", help="A codec of the cache; may be given several times. Default: bf16."),
]
Plot = Annotated[Path | None, typer.Option(help="Draw a heatmap by length and depth into this PNG.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of everything that is random.")]


@app.command()
def recall(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A model of `kvist train --preset recall`; the bundled one when left out."
        ),
    ] = None,
    kv: Kvs = None,
    length: Annotated[str, typer.Option("--length", metavar="N,...", help="Tokens.")] = "128,256,512,1024",
    questions: Annotated[int, typer.Option(min=1, help="Asked for each length, at least.")] = 2048,
    seed: Seed = 0,
    plot: Plot = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Ask for values that stand in the cache among noise: the share of right answers, and the KL divergence from the
    run over a cache in full precision."""
    prepare(threads)
    from kvist.evals.recall import RecallEval, RecallReport
    from kvist.evals.recall import plot as draw
    from kvist.service.loaded import RECALL, open_model

    _require_matplotlib(plot)
    lengths, name = numbers(length, "--length", "256,1024"), model or str(RECALL)
    # Every codec is opened before the first is measured: a wrong name is told at once.
    opened = [(codec, open_model(name, kv=codec)) for codec in kv or ["bf16"]]
    with _progress() as observe:
        measure = RecallEval(open_model(name, kv="fp32"), lengths, questions, seed, observe)
        rows = [measure.score(loaded, codec, observe) for codec, loaded in opened]
    report = RecallReport("kvist-recall" if model is None else opened[0][1].name, rows)
    if as_json:
        print_json(report.to_json())
    else:
        _print_recall(report)
    if plot is not None:
        draw(report, plot)
        note(f"picture: {plot}")


@app.command()
def needle(
    text: Annotated[Path, typer.Option(help="The long text, in UTF-8.")],
    model: Model = None,
    kv: Kvs = None,
    length: Annotated[
        str | None,
        typer.Option("--length", metavar="N,...", help="Tokens; by default powers of two, 256 to 4096, that fit."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Random numbers for each length and depth.")] = 4,
    seed: Seed = 0,
    plot: Plot = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Hide a sentence with a random number in a long text and ask for it: is the greedy continuation the number, and
    how much likelier does the sentence make it?"""
    prepare(threads)
    from kvist.evals.needle import Haystack, NeedleEval, NeedleReport
    from kvist.evals.needle import plot as draw
    from kvist.service.loaded import open_model
    from kvist.text.reading import read_text

    _require_matplotlib(plot)
    lengths = [] if length is None else numbers(length, "--length", "256,1024")
    words = read_text(text)
    opened = [(codec, open_model(model, kv=codec)) for codec in kv or ["bf16"]]
    first = opened[0][1]
    haystack = Haystack(first.tokenizer(), words, seed)
    measure = NeedleEval(haystack, first.config.max_positions, lengths, trials)
    with _progress() as observe:
        rows = [measure.score(loaded, codec, observe) for codec, loaded in opened]
    report = NeedleReport(first.name, text.name, haystack.spelling, rows)
    if as_json:
        print_json(report.to_json())
    else:
        _print_needle(report)
    if plot is not None:
        draw(report, plot)
        note(f"picture: {plot}")


@contextmanager
def _progress() -> "Iterator[Callable[[str], None]]":
    """What is being measured, on stderr, where that is a terminal."""
    from rich.console import Console

    with Console(stderr=True).status("measuring", spinner="line") as status:
        yield lambda what: status.update(f"measuring {what}")


def _print_recall(report: "RecallReport") -> None:
    whole = [("kv", "bits", "bytes a token", "accuracy", "KLD mean", "99 %", "99.9 %", "most", "same top")]
    for row in report.rows:
        score = row.score
        kld = (score.kld_mean, score.kld_p99, score.kld_p999, score.kld_max)
        shares = (f"{score.accuracy:.4f}", *(f"{nats:.2g}" for nats in kld), f"{score.same_top1:.4f}")
        whole.append((row.kv, f"{row.bits_per_value:.4g}", f"{row.bytes_per_token:,.0f}", *shares))
    by_length = [("kv", *(f"{part.length:,} tokens" for part in report.rows[0].by_length))]
    by_depth = [("kv", *(f"{part.start:.0%} to {part.end:.0%}" for part in report.rows[0].by_depth))]
    for row in report.rows:
        by_length.append((row.kv, *(f"{part.score.accuracy:.4f}" for part in row.by_length)))
        by_depth.append((row.kv, *(f"{part.score.accuracy:.4f}" for part in row.by_depth)))
    cached = ", ".join(f"{part.cached_tokens:,}" for part in report.rows[0].by_length)
    _print_tables(
        {
            f"{report.model}: {report.rows[0].score.questions:,} questions": whole,
            f"accuracy by length; tokens read from the cache: {cached}": by_length,
            "accuracy by depth of the pair in its context": by_depth,
        }
    )


def _print_needle(report: "NeedleReport") -> None:
    whole = [("kv", "bits", "bytes a token", "exact", "log p", "log p without", "gain")]
    cells = [("kv", "tokens", "depth", "read from the cache", "exact", "log p", "log p without", "gain")]
    for row in report.rows:
        size = (f"{row.bits_per_value:.4g}", f"{row.bytes_per_token:,.0f}")
        means = (f"{row.log_probability:.2f}", f"{row.log_probability_without:.2f}", f"{row.gain:.2f}")
        whole.append((row.kv, *size, f"{row.exact:.3f}", *means))
        for cell in row.cells:
            place = (f"{cell.length:,}", f"{cell.depth:.0%}", f"{cell.cached_tokens:,}", f"{cell.exact:.2f}")
            nats = (f"{cell.log_probability:.2f}", f"{cell.log_probability_without:.2f}", f"{cell.gain:.2f}")
            cells.append((row.kv, *place, *nats))
    title = f"{report.model}: a number in {report.spelling} within {report.text}; log-probabilities in nats"
    _print_tables({title: whole, "by length and depth of the needle": cells})


def _print_tables(tables: dict[str, list[tuple[str, ...]]]) -> None:
    """Each under its title; the first row of each is its head."""
    from rich.table import Table

    from kvist.base.tables import output, show

    console = output()
    for title, (head, *rows) in tables.items():
        console.print(title, style="bold")
        table = Table(*head, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        show(console, table)
        console.print()


def _require_matplotlib(plot: Path | None) -> None:
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise KvistError(f"a picture takes matplotlib, which is missing; {install('plots')} brings it")
