"""`kvist train`: a model of one's own, from a text file."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvist.base.errors import KvistError
from kvist.base.units import format_duration
from kvist.cli.options import Json, graceful_interrupt, note, print_json
from kvist.cli.process import Threads, prepare

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvist.train.loop import Progress
    from kvist.train.recall import RecallProgress, RecallReport
    from kvist.train.report import TrainReport
    from kvist.train.settings import TrainSettings

SAMPLE_TOKENS = 300
RECALL = "recall"  # the preset that takes no text


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint directory to make.")],
    corpus: Annotated[Path | None, typer.Argument(help="A text file in UTF-8; the recall preset takes none.")] = None,
    preset: Annotated[str, typer.Option(help="The recipe to start from; `kvist train --help` lists them.")] = "default",
    steps: Annotated[int | None, typer.Option(help="Another number of steps than the preset's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the order of the text.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other setting of the preset; may be given several times."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small model on a text; Ctrl-C stops after the current step, and --resume goes on.

    Presets: nanogpt (its published CPU recipe), default (a better one over as many tokens), bundled (the model that
    comes with kvist), recall (a model of no language that finds values by their keys, for `kvist eval recall`).
    """
    prepare(threads)
    if preset == RECALL:
        if corpus is not None or steps is not None or change or resume:
            raise KvistError("the recall preset makes its own data and takes minutes: only --out and --seed go with it")
        _train_recall(out, seed, as_json)
        return
    from kvist.train.loop import train as run

    settings = _settings(preset, steps, seed, change or [])
    if corpus is None:
        raise KvistError(f"the preset {preset!r} trains on a text; name one, as in: kvist train corpus.txt -o DIR")
    with graceful_interrupt() as interrupt, _progress_bar() as observe:
        report = run(corpus, out, settings, resume=resume, observe=observe, stop=interrupt)
    if as_json:
        print_json(_as_json(report, preset))
    else:
        _print_sample(report)


def _settings(preset: str, steps: int | None, seed: int | None, changes: list[str]) -> "TrainSettings":
    """The preset with what the command line changes. Raises `KvistError` naming a setting that does not exist."""
    from kvist.train.settings import PRESETS

    if preset not in PRESETS:
        raise KvistError(f"there is no preset {preset!r}; choose one of {', '.join((*PRESETS, RECALL))}")
    settings = PRESETS[preset]
    kinds = {field.name: type(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in kinds:
            raise KvistError(f"there is no setting {name!r}; choose among {', '.join(kinds)}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise KvistError(f"{name} should be of type {kinds[name].__name__}, got {value!r}") from None
    values |= {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    return dataclasses.replace(settings, **values)


@contextmanager
def _progress_bar() -> "Iterator[Callable[[Progress], None]]":
    """A live bar with losses, tokens per second and time left on a terminal; a line per validation elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    def lines(progress: "Progress") -> None:
        if progress.validation_loss is not None:
            note(
                f"step {progress.step:,} of {progress.steps:,} · loss {progress.loss:.4f} · "
                f"validation {progress.validation_loss:.4f} · {progress.tokens_per_second:,.0f} tokens/s"
            )

    if not sys.stderr.isatty():
        yield lines
        return
    with Bar(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("training", said="", total=None)
        validation = ""

        def observe(progress: "Progress") -> None:
            nonlocal validation
            if progress.validation_loss is not None:
                validation = f" · validation {progress.validation_loss:.4f}"
            said = (
                f"loss {progress.loss:.4f}{validation} · {progress.tokens_per_second:,.0f} tokens/s · "
                f"{format_duration(progress.seconds_left)} left"
            )
            bar.update(task, completed=progress.step, total=progress.steps, said=said)

        yield observe


def _train_recall(out: Path, seed: int | None, as_json: bool) -> None:
    from kvist.train.recall import RecallSettings, train_recall

    settings = RecallSettings() if seed is None else RecallSettings(seed=seed)
    with _recall_status() as observe:
        report = train_recall(out, settings, observe)
    if as_json:
        print_json(_as_json(report, RECALL))
        return
    last = settings.stages[-1]
    note(
        f"{report.parameters:,} parameters · {report.tokens:,} tokens in {format_duration(report.seconds)} · "
        f"{report.accuracy:.2%} of {report.questions:,} values recalled, {last.pairs} in {last.length:,} tokens"
    )
    note(f"wrote {report.directory}")


@contextmanager
def _recall_status() -> "Iterator[Callable[[RecallProgress], None]]":
    """One live line on a terminal; a line per measured accuracy elsewhere."""
    from rich.console import Console

    def told(progress: "RecallProgress") -> str:
        accuracy = "" if progress.accuracy is None else f" · {progress.accuracy:.1%} recalled"
        return (
            f"step {progress.step:,} · {progress.pairs} pairs in {progress.length:,} tokens (stage {progress.stage} of "
            f"{progress.stages}) · loss {progress.loss:.4f}{accuracy}"
        )

    if not sys.stderr.isatty():
        yield lambda progress: note(told(progress)) if progress.accuracy is not None else None
        return
    with Console(stderr=True).status("training", spinner="line") as status:
        yield lambda progress: status.update(told(progress))


def _print_sample(report: "TrainReport") -> None:
    from kvist.runtime.request import Sampling
    from kvist.train.report import CURVE, CURVE_HINT, sample

    generation = sample(report, SAMPLE_TOKENS, Sampling(temperature=0.8, seed=1))
    print(report.prompt, end="")
    for piece in generation:
        print(piece, end="", flush=True)
    print()
    note(
        f"{report.parameters:,} parameters · {report.tokens:,} tokens in {format_duration(report.seconds)} · "
        f"validation loss {report.validation_loss:.4f} (best, after step {report.best_step:,})"
    )
    note(f"wrote {report.directory} · curve: {report.directory / CURVE}" if report.curve else CURVE_HINT)


def _as_json(report: "TrainReport | RecallReport", preset: str) -> dict[str, object]:
    return dataclasses.asdict(report) | {"directory": str(report.directory), "preset": preset}
