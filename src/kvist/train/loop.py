"""`train`: from a text file to a checkpoint directory; it validates, can be interrupted, and resumes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvist.train.data import read_corpus
from kvist.train.report import TrainReport, write_checkpoint
from kvist.train.settings import TrainError, TrainSettings
from kvist.train.state import load_state, save_state, state_path
from kvist.train.trainer import Trainer


class Interrupted(TrainError):
    """Stopped when asked to, with the state saved. The message says how to go on."""

    exit_code = 130


@dataclass(frozen=True)
class Progress:
    """After a step. `loss` of that step and `validation_loss`, where it was measured, in nats per token."""

    step: int  # done, of `steps`
    steps: int
    loss: float
    validation_loss: float | None
    tokens_per_second: float
    seconds_left: float


def train(
    corpus: Path,
    directory: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    observe: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> TrainReport:
    """Train on the text file `corpus` and write the checkpoint directory `directory`, whole or not at all.

    The weights written are those of the lowest validation loss. While the run lasts, `directory` holds its
    state alone, which `resume` continues and the checkpoint replaces. `stop` is asked after each step.

    Raises `TextError` for an unusable corpus, `TrainError` for an output that is taken, a state that does not
    fit or a loss that is not a number, `Interrupted` when `stop` said so, `KvistError` when writing fails.
    """
    text = read_corpus(corpus, settings)
    trainer = Trainer(settings, text)
    spent = 0.0
    if resume:
        state = load_state(directory, settings, text.digest)
        trainer.restore(state)
        spent = state.seconds
    else:
        _require_free(directory)
    started = time.perf_counter() - spent

    def keep() -> None:
        save_state(directory, trainer.state(time.perf_counter() - started), settings, text.digest)

    # Kept before the first step too: a place that cannot be written is told at once.
    keep()
    _run(trainer, observe, stop, keep)
    trainer.take_best()
    return write_checkpoint(directory, trainer, time.perf_counter() - started)


def _run(
    trainer: Trainer, observe: Callable[[Progress], None], stop: Callable[[], bool], keep: Callable[[], None]
) -> None:
    settings, first, started = trainer.settings, trainer.done, time.perf_counter()
    while trainer.done < settings.steps:
        loss, validation = trainer.step(), None
        if trainer.done % settings.evaluate_every == 0 or trainer.done == settings.steps:
            validation = trainer.validate()
        pace = (time.perf_counter() - started) / (trainer.done - first)
        left = settings.steps - trainer.done
        rate = settings.tokens_per_step / pace
        observe(Progress(trainer.done, settings.steps, loss, validation, rate, left * pace))
        stopping = left > 0 and stop()
        if stopping or trainer.done % settings.save_every == 0:
            keep()
        if stopping:
            raise Interrupted(
                f"stopped after step {trainer.done:,} of {settings.steps:,}; the same command with --resume goes on"
            )


def _require_free(directory: Path) -> None:
    if state_path(directory).is_file():
        raise TrainError(f"{directory} holds an unfinished run; go on with --resume, or delete it")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TrainError(f"{directory} exists and is not an empty directory; choose another output")
