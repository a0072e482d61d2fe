"""One run's weights, moments and history: a step, a validation, and the state from which both go on."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.models.families import read_config
from kvist.models.load import build
from kvist.train.data import Corpus, training_rows
from kvist.train.dense import DenseActivations, Dropout, row_logits
from kvist.train.optimizer import Optimizer, initialize
from kvist.train.settings import TrainError, TrainSettings
from kvist.train.state import State

_EVALUATION_TOKENS = 4096  # of one forward pass


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token over a whole text, and by position in the context, `[context]` float64."""

    loss: float
    by_position: Tensor


class Trainer:
    """Owns the weights, the moments, the best weights and the history; the rest follows from the settings."""

    def __init__(self, settings: TrainSettings, corpus: Corpus) -> None:
        self.settings = settings
        self.corpus = corpus
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self._dropout = Dropout(settings.dropout)
        config = read_config(settings.config_json(corpus.tokenizer.get_vocab_size()), "the training settings")
        self.model = build(config, DenseActivations(self._dropout), torch.float32)
        initialize(self.model, settings.seed)
        self.model.requires_grad_(True).train()
        self._optimizer = Optimizer(self.model, settings)
        self._best: dict[str, Tensor] = {}

    @property
    def done(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float]:
        """After which step the validation loss was lowest, and that loss."""
        return min(self.validations, key=lambda validation: validation[1])

    def step(self) -> float:
        """One step; returns its training loss. Raises `TrainError` when that is not a number."""
        settings, step = self.settings, self.done
        self._dropout.begin(settings.seed, step)
        rows = training_rows(self.corpus.train, settings, step)
        logits = row_logits(self.model, rows[:, :-1], self._dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        self._dropout.end()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clip)
        self._optimizer.step(settings.learning_rate_at(step))
        self.losses.append(self._finite(loss.item()))
        return self.losses[-1]

    def validate(self) -> float:
        """Measure the loss on the whole validation part; keep the weights when they are the best so far."""
        loss = self._finite(self.evaluate().loss)
        self.validations.append((self.done, loss))
        if self.best[0] == self.done:
            self._best = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        return loss

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The loss on the validation part: windows of the context's length, each from position 0, that do not
        overlap and cover it; the last may be shorter. Every token but the first is predicted once."""
        context, tokens = self.settings.context, self.corpus.validation
        whole = (len(tokens) - 1) // context * context
        inputs, targets = tokens[:whole].view(-1, context), tokens[1 : whole + 1].view(-1, context)
        rows = max(1, _EVALUATION_TOKENS // context)
        batches = list(zip(inputs.split(rows), targets.split(rows), strict=True))
        if whole < len(tokens) - 1:
            batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
        sums, counts = torch.zeros(context, dtype=torch.float64), torch.zeros(context, dtype=torch.float64)
        self.model.eval()
        for batch, wanted in batches:
            logits = row_logits(self.model, batch, self._dropout)
            losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
            sums[: losses.shape[1]] += losses.double().sum(0)
            counts[: losses.shape[1]] += losses.shape[0]
        self.model.train()
        return Evaluation(float(sums.sum() / counts.sum()), sums / counts)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise TrainError(f"the loss after {self.done:,} steps is not a number; lower the learning rate")
        return loss

    def take_best(self) -> None:
        """Put the best weights into the model: the run is over."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self._best[name])

    def state(self, seconds: float) -> State:
        """All that `restore` needs."""
        tensors: dict[str, Tensor] = {f"weights.{name}": weight for name, weight in self.model.named_parameters()}
        tensors |= {f"best.{name}": weight for name, weight in self._best.items()}
        tensors |= {f"moments.{name}": moment for name, moment in self._optimizer.tensors().items()}
        return State(self.losses, self.validations, seconds, tensors)

    def restore(self, state: State) -> None:
        """Go on where `state` was taken, bit for bit, on the same machine with as many threads."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "moments": {}}
        for name, tensor in state.tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(parts["weights"][name])
        self._best = parts["best"]
        self._optimizer.restore(parts["moments"])
        self.losses, self.validations = list(state.losses), list(state.validations)
