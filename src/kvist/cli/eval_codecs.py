"""`kvist eval codecs`: what each codec does to random vectors."""

from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.cli.options import Json, print_json
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from rich.table import Table

    from kvist.evals.codecs import Report


def codecs(
    name: Annotated[
        str | None, typer.Option("--codec", metavar="NAME,...", help="Codecs; by default all that there are.")
    ] = None,
    dim: Annotated[str, typer.Option(metavar="N,...", help="Head sizes.")] = "64,128",
    samples: Annotated[int, typer.Option(min=64, help="Vectors that each codec is given.")] = 16_384,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure bits, distortion and bias of codecs on random vectors, and what centring the keys is worth."""
    prepare(threads)
    from rich.console import Console

    from kvist.base.tables import output, show
    from kvist.cache.codecs import CODECS
    from kvist.evals.codecs import run

    names = list(CODECS) if name is None else name.split(",")
    with Console(stderr=True).status("measuring", spinner="line") as status:
        report = run(_numbers(dim), names, samples, observe=lambda what: status.update(f"measuring {what}"))
    if as_json:
        print_json(report.to_json())
        return
    console = output()
    for table in _tables(report):
        if table.rows:
            show(console, table)


def _tables(report: "Report") -> list["Table"]:
    from rich.table import Table

    distortions = Table(
        *("codec", "head", "bits", "|x̂ - x|² of keys", "of values", "d <y, x̂ - x>²", "bias", "± its error"),
        title=f"{report.samples:,} random unit vectors",
        title_justify="left",
    )
    for row in report.distortions:
        errors = (f"{value:.3g}" for value in (row.key_error, row.value_error, row.product_error))
        bias = (f"{row.bias:+.4f}", f"{row.bias_deviation:.4f}")
        distortions.add_row(row.codec, str(row.dim), f"{row.bits:g}", *errors, *bias)
    logits = Table(
        *("codec", "head", "as they are", "less their mean"),
        title="correlation of logits, |mean| of keys = 10 deviations",
        title_justify="left",
    )
    for row in report.logits:
        logits.add_row(row.codec, str(row.dim), f"{row.plain:.3f}", f"{row.centred:.3f}")
    values = Table(
        *("codec", "head", "values", "shared energy", "unbiased", "least squares"),
        title="relative squared error of an average of values, by their scale",
        title_justify="left",
    )
    for row in report.values:
        errors = (f"{value:.3g}" for value in (row.unbiased, row.least_squares))
        values.add_row(row.codec, str(row.dim), str(row.tokens), f"{row.shared:g}", *errors)
    return [distortions, logits, values]


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise KvistError(f"--dim takes head sizes, as in 64,128; got {text!r}")
    return numbers
