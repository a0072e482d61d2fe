"""What a finished run leaves: the checkpoint directory, with its losses and how it was made."""

import csv
import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvist.base.errors import install
from kvist.base.files import atomic_folder
from kvist.models.load import export
from kvist.runtime.request import Sampling
from kvist.service.generation import Generation, generate
from kvist.service.loaded import open_model
from kvist.text.training import save_tokenizer
from kvist.train.trainer import Evaluation, Trainer
from kvist.weights.checkpoint import SINGLE_FILE, save

CURVE = "losses.png"
CURVE_HINT = f"no loss curve was drawn: matplotlib is missing; {install('plots')} brings it"
_POSITION_BUCKETS = 8


@dataclass(frozen=True)
class TrainReport:
    """A finished run. Losses on the whole validation part, in nats, of the weights that were written.

    `curve`: whether the loss curve was drawn, which takes matplotlib. `prompt`: where `sample` begins.
    """

    directory: Path
    parameters: int
    tokens: int
    steps: int
    best_step: int
    validation_loss: float
    validation_loss_per_character: float
    seconds: float
    curve: bool
    prompt: str


def write_checkpoint(directory: Path, trainer: Trainer, seconds: float) -> TrainReport:
    """Write the model of `trainer`, with the weights it now has, to `directory`: all files, or none."""
    model, corpus, settings = trainer.model, trainer.corpus, trainer.settings
    evaluation = trainer.evaluate()
    tokens = corpus.validation.tolist()
    # The first token is given, not predicted.
    predicted = corpus.validation_characters - len(corpus.tokenizer.decode(tokens[:1]))
    report = TrainReport(
        directory=directory,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=settings.steps * settings.tokens_per_step,
        steps=settings.steps,
        best_step=trainer.best[0],
        validation_loss=evaluation.loss,
        validation_loss_per_character=evaluation.loss * (len(tokens) - 1) / predicted,
        seconds=seconds,
        curve=importlib.util.find_spec("matplotlib") is not None,
        prompt=corpus.tokenizer.decode(tokens[: min(32, settings.context // 2)]),
    )
    with atomic_folder(directory) as folder:
        save(folder / SINGLE_FILE, export(model))
        save_tokenizer(corpus.tokenizer, folder)
        _write_json(folder / "config.json", settings.config_json(model.config.vocab_size))
        _write_json(folder / "training.json", _facts(report, trainer, evaluation))
        _write_losses(folder / "losses.csv", trainer)
        if report.curve:
            _plot(folder / CURVE, trainer)
    return report


def sample(report: TrainReport, tokens: int, sampling: Sampling) -> Generation:
    """The start of the validation part, continued by the written model through the engine and its cache."""
    return generate(open_model(str(report.directory)), report.prompt, max_tokens=tokens, sampling=sampling)


def _facts(report: TrainReport, trainer: Trainer, evaluation: Evaluation) -> dict[str, Any]:
    """How the weights were made and how good they are: `training.json`."""
    corpus = trainer.corpus
    parts = evaluation.by_position.tensor_split(_POSITION_BUCKETS)
    ends = [int(end) for end in torch.tensor([len(part) for part in parts]).cumsum(0)]
    return {
        "corpus": {"file": corpus.name, "sha256": corpus.digest},
        "tokens": {
            "training": len(corpus.train),
            "validation": len(corpus.validation),
            "seen": report.tokens,
        },
        "parameters": report.parameters,
        "best_step": report.best_step,
        "validation_loss": report.validation_loss,
        "validation_loss_per_character": report.validation_loss_per_character,
        "validation_loss_by_position": {
            f"{end - len(part)}..{end - 1}": float(part.mean())
            for end, part in zip(ends, parts, strict=True)
            if len(part)
        },
        "seconds": round(report.seconds, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": asdict(trainer.settings),
    }


def _write_losses(path: Path, trainer: Trainer) -> None:
    """One line a step: steps done, training loss of the step, validation loss where it was measured."""
    validations = dict(trainer.validations)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "training_loss", "validation_loss"))
        for step, loss in enumerate(trainer.losses, start=1):
            writer.writerow((step, f"{loss:.6f}", f"{validations[step]:.6f}" if step in validations else ""))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _plot(path: Path, trainer: Trainer) -> None:
    """The training loss, smoothed over a hundredth of the run, and the validation losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = torch.tensor(trainer.losses, dtype=torch.float64)
    span = max(1, len(losses) // 100)
    smooth = losses.unfold(0, span, 1).mean(-1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(range(span, len(losses) + 1), smooth.tolist(), label=f"training, mean of {span} steps", linewidth=1)
    steps, validations = zip(*trainer.validations, strict=True)
    axes.plot(steps, validations, "o-", label="validation", markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
