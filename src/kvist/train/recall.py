"""A small model that recalls: trained from nothing in minutes, so that what a lossy cache forgets can be measured.

Two layers are enough to find a key and copy what stood behind it (an induction head, Olsson et al. 2022, arXiv
2209.11895), but the answers of long sequences alone teach it very slowly. Two things make it quick: sequences grow
from short ones, each length until it is mastered, and some batches repeat a random segment, where every token of the
repetition is a question.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.files import atomic_folder
from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.text.recall import BEGIN, FIRST_KEY, VOCAB_SIZE, recall_batch
from kvist.train.dense import DenseActivations, Dropout, row_logits
from kvist.train.settings import TrainError
from kvist.weights.checkpoint import SINGLE_FILE, save

CONTEXT = 1024
_IGNORED = -100  # a target that is not learned from, as `cross_entropy` has it
_MOST_ROWS = 64
_TOKENS_AT_ONCE = 8192  # where nothing is learned
_QUESTIONS = 1024  # asked to see whether a stage is mastered
_LAST_QUESTIONS = 16_384  # asked of the finished model
_FIRST_STD = 0.02  # of the first weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Stage:
    """Sequences of `length` tokens with `pairs` pairs; `repeats` of the batches repeat a random segment instead."""

    length: int
    pairs: int
    repeats: float


STAGES = (
    Stage(32, 6, 0.9),
    Stage(64, 8, 0.9),
    Stage(128, 16, 0.3),
    Stage(256, 32, 0.3),
    Stage(512, 64, 0.3),
    Stage(1024, 128, 0.3),
)


@dataclass(frozen=True)
class RecallSettings:
    """One run. AdamW (arXiv 1711.05101); the learning rate rises over `warmup_steps`, stays, and falls along a cosine
    over the `final_steps` that follow when the last stage is mastered.

    `mastered`: the accuracy at which a stage ends, measured every `evaluate_every` steps. Raises `TrainError` for
    values that make no run.
    """

    seed: int = 0
    stages: tuple[Stage, ...] = STAGES
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-4
    warmup_steps: int = 50
    final_steps: int = 200
    most_steps: int = 4000
    evaluate_every: int = 50
    mastered: float = 0.97
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise TrainError(f"a seed is a number from 0 to 2^31 - 1, got {self.seed}")


@dataclass(frozen=True)
class RecallProgress:
    """After a step of stage `stage` of `stages`. `accuracy`: on that stage's sequences, where it was measured."""

    step: int
    stage: int
    stages: int
    length: int
    pairs: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Mastered:
    """The end of a stage: after how many steps in all, and the accuracy that ended it."""

    length: int
    pairs: int
    steps: int
    accuracy: float


@dataclass(frozen=True)
class RecallReport:
    """A finished run. `accuracy`: of the weights written, on fresh sequences of the last stage with `questions` in all;
    `tokens`: trained on."""

    directory: Path
    parameters: int
    steps: int
    tokens: int
    seconds: float
    stages: list[Mastered]
    questions: int
    accuracy: float


class RecallTrainer:
    """Owns the weights, the moments and the random numbers of one run: everything follows from the settings."""

    def __init__(self, settings: RecallSettings) -> None:
        self.settings = settings
        self.steps = self.tokens = 0  # done, and trained on
        self._dropout = Dropout(0.0)
        model = build(read_config(CONFIG, "the recall recipe"), DenseActivations(self._dropout), torch.float32)
        self.model = randomize(model, settings.seed, _FIRST_STD).requires_grad_(True).train()
        self._generator = torch.Generator().manual_seed(settings.seed)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)

    def step(self, stage: Stage, decay: float = 1.0) -> float:
        """One step on a batch of `stage`, at `decay` of the learning rate; returns its loss in nats per answer."""
        settings = self.settings
        rows = _rows(stage, settings.tokens_per_step)
        if torch.rand((), generator=self._generator) < stage.repeats:
            tokens, targets = repeated_batch(rows, stage.length, self._generator)
        else:
            tokens, targets = answered_batch(rows, stage, self._generator)
        logits = row_logits(self.model, tokens, self._dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        self.steps += 1
        self.tokens += tokens.numel()
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * decay * min(1.0, self.steps / settings.warmup_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise TrainError(f"the loss after {self.steps:,} steps is not a number; choose another seed")
        return loss.item()

    @torch.no_grad()
    def accuracy(self, stage: Stage, seed: int, questions: int) -> float:
        """The share of right answers to at least `questions` questions, in sequences of `stage` made from `seed`."""
        generator, right, asked = torch.Generator().manual_seed(seed), 0, 0
        self.model.eval()
        while asked < questions:
            batch = recall_batch(_rows(stage, _TOKENS_AT_ONCE), stage.length, stage.pairs, generator)
            logits = row_logits(self.model, batch.tokens, self._dropout)[:, batch.questions]
            right += int((logits.argmax(-1) == batch.answers).sum())
            asked += batch.answers.numel()
        self.model.train()
        return right / asked


def _rows(stage: Stage, tokens: int) -> int:
    return min(_MOST_ROWS, max(1, tokens // stage.length))


def answered_batch(rows: int, stage: Stage, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Recall sequences and their targets, both `[rows, length]` int64: only answers are learned from."""
    batch = recall_batch(rows, stage.length, stage.pairs, generator)
    targets = torch.full_like(batch.tokens, _IGNORED)
    targets[:, batch.questions] = batch.answers
    return batch.tokens, targets


def repeated_batch(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random segment, repeated to the end of each row; learned from: every token of a repetition.

    Tokens and targets `[rows, length]` int64. The segment is as long in every row of the batch, 8 tokens at least.
    """
    segment = int(torch.randint(8, (length - 1) // 2, (), generator=generator))
    once = torch.randint(FIRST_KEY, VOCAB_SIZE, (rows, segment), generator=generator)
    tokens = torch.full((rows, length), BEGIN)
    tokens[:, 1:] = once.repeat(1, -(-length // segment))[:, : length - 1]
    targets = torch.full_like(tokens, _IGNORED)
    targets[:, segment:-1] = tokens[:, segment + 1 :]
    return tokens, targets


def train_recall(
    directory: Path, settings: RecallSettings, observe: Callable[[RecallProgress], None] = lambda progress: None
) -> RecallReport:
    """Train, and write the checkpoint directory `directory`, whole or not at all. The seed decides every number, on
    one machine with as many threads.

    Raises `TrainError` when `directory` is taken or when `most_steps` did not suffice to master every stage.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TrainError(f"{directory} exists and is not an empty directory; choose another output")
    started = time.perf_counter()
    trainer = RecallTrainer(settings)
    mastered = [_master(trainer, number, observe) for number in range(1, len(settings.stages) + 1)]
    _finish(trainer, observe)
    seconds = time.perf_counter() - started
    report = RecallReport(
        directory=directory,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        steps=trainer.steps,
        tokens=trainer.tokens,
        seconds=round(seconds, 1),
        stages=mastered,
        questions=_LAST_QUESTIONS,
        # Not the sequences that decided when a stage ended.
        accuracy=trainer.accuracy(settings.stages[-1], settings.seed + 2, _LAST_QUESTIONS),
    )
    _write(report, trainer)
    return report


def _master(trainer: RecallTrainer, number: int, observe: Callable[[RecallProgress], None]) -> Mastered:
    """Steps of stage `number` until it is mastered."""
    settings = trainer.settings
    stage = settings.stages[number - 1]
    while trainer.steps < settings.most_steps:
        loss, accuracy = trainer.step(stage), None
        if trainer.steps % settings.evaluate_every == 0:
            accuracy = trainer.accuracy(stage, settings.seed + 1, _QUESTIONS)
        observe(_progress(trainer, number, loss, accuracy))
        if accuracy is not None and accuracy >= settings.mastered:
            return Mastered(stage.length, stage.pairs, trainer.steps, accuracy)
    raise TrainError(
        f"after {trainer.steps:,} steps stage {number} of {len(settings.stages)} ({stage.pairs} pairs in "
        f"{stage.length:,} tokens) is not mastered; choose another seed"
    )


def _finish(trainer: RecallTrainer, observe: Callable[[RecallProgress], None]) -> None:
    """The last steps, all of the last stage, with a falling learning rate."""
    settings = trainer.settings
    stage, floor = settings.stages[-1], settings.final_learning_rate / settings.learning_rate
    for done in range(1, settings.final_steps + 1):
        decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done / settings.final_steps))
        loss, accuracy = trainer.step(stage, decay), None
        if done % settings.evaluate_every == 0:
            accuracy = trainer.accuracy(stage, settings.seed + 1, _QUESTIONS)
        observe(_progress(trainer, len(settings.stages), loss, accuracy))


def _progress(trainer: RecallTrainer, number: int, loss: float, accuracy: float | None) -> RecallProgress:
    stages = trainer.settings.stages
    stage = stages[number - 1]
    return RecallProgress(trainer.steps, number, len(stages), stage.length, stage.pairs, loss, accuracy)


def _write(report: RecallReport, trainer: RecallTrainer) -> None:
    facts = asdict(report) | {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": asdict(trainer.settings),
    }
    del facts["directory"]
    with atomic_folder(report.directory) as folder:
        save(folder / SINGLE_FILE, export(trainer.model))
        for name, value in {"config.json": CONFIG, "training.json": facts}.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
