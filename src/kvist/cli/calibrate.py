"""`kvist calibrate`: measure a model's keys and values, and propose codecs for its layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes
from kvist.cli.options import Dtype, Json, Model, note, print_json
from kvist.cli.process import Threads, prepare
from kvist.cli.run import INTERRUPTED

if TYPE_CHECKING:
    from kvist.evals.calibrate import CalibrationReport, Candidate
    from kvist.service.loaded import Loaded


def calibrate(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help="A text in UTF-8; a built-in one when left out.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="The least quality of any layer's keys and values; 0.99 when left out.")
    ] = None,
    given: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Take over a calibration made elsewhere.")
    ] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a model's keys and values on a text and propose the cheapest codecs, layer by layer, that keep what
    attention sees: what `--kv auto` stands for from then on."""
    prepare(threads)
    from rich.console import Console

    from kvist.cache.calibration import save_calibration
    from kvist.evals.calibrate import THRESHOLD
    from kvist.evals.calibrate import calibrate as run
    from kvist.service.calibration import calibration_path, calibration_text
    from kvist.service.digest import model_digest
    from kvist.service.loaded import open_model
    from kvist.text.reading import read_text

    if given is not None and (text is not None or threshold is not None):
        raise KvistError("--import takes a calibration as it is; --text and --threshold are for making one")
    words = None if text is None else read_text(text)
    loaded = open_model(model, dtype=dtype)
    digest = model_digest(loaded.model, loaded.weights_digest())
    path = calibration_path(digest)
    if given is not None:
        _take_over(given, loaded, digest, as_json)
        return
    tokens, name = calibration_text(loaded.model, loaded.directory, words)
    least = THRESHOLD if threshold is None else threshold
    try:
        with Console(stderr=True).status("calibrating", spinner="line") as status:
            watch = lambda what: status.update(f"calibrating · {what}")  # noqa: E731
            calibration, report = run(loaded, tokens, name if text is None else text.name, least, watch)
    except KeyboardInterrupt:
        note("stopped; nothing was changed")
        raise typer.Exit(INTERRUPTED) from None
    save_calibration(path, calibration)
    if as_json:
        print_json(report.to_json() | {"path": str(path)})
    else:
        _print(report)
    note(f"--kv auto is now {report.proposal} · {path}")


def _take_over(given: Path, loaded: "Loaded", digest: str, as_json: bool) -> None:
    from kvist.cache.calibration import save_calibration
    from kvist.service.calibration import calibration_path, read_calibration

    calibration, path = read_calibration(given, loaded.model, digest), calibration_path(digest)
    save_calibration(path, calibration)
    if as_json:
        facts = {"model": loaded.name, "tokens": calibration.tokens, "proposal": calibration.proposal}
        print_json(facts | {"path": str(path)})
    note(f"took over {given}, measured on {calibration.tokens:,} tokens · {path}")


def _print(report: "CalibrationReport") -> None:
    from rich.table import Table

    from kvist.base.tables import output, show

    console = output()
    title = f"{report.model} · {report.text}, {report.tokens:,} tokens · at least {report.threshold}"
    layers = Table(title=title, title_justify="left")
    for column in ("layer", "stream", "mean / σ", "drift / σ", "codec", "scores", "output"):
        layers.add_column(column, justify="left" if column in ("stream", "codec") else "right")
    for layer in report.layers:
        place = ", ".join(map(str, (layer.layer, *layer.readers)))
        for name, stream in layer.streams.items():
            means = ("" if number is None else f"{number:.2f}" for number in (stream.mean, stream.drift))
            layers.add_row(place, name, *means, stream.chosen.codec, *_numbers(stream.chosen))
            place = ""
    show(console, layers)
    codecs = Table(title="the worst layer under each codec", title_justify="left")
    codecs.add_column("codec")
    codecs.add_column("bits/value", justify="right")
    worst = report.worst()
    for name in worst:
        codecs.add_column(f"{name}: scores", justify="right")
        codecs.add_column(f"{name}: output", justify="right")
    for row in zip(*worst.values(), strict=True):
        bits = max(found.bits for found in row)
        codecs.add_row(row[0].codec, f"{bits:.3g}", *(number for found in row for number in _numbers(found)))
    show(console, codecs)
    console.print(
        f"{report.proposal}: {report.bits_per_value:.3g} bits a value, {format_bytes(report.bytes_per_token)} a token"
    )


def _numbers(found: "Candidate") -> tuple[str, str]:
    """Of scores and of output."""
    return "" if found.correlation is None else f"{found.correlation:.4f}", f"{found.output:.4f}"
