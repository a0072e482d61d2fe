"""Whole runs: what they learn, that a resumed run is an uninterrupted one, and what is left behind."""

import csv
import errno
import importlib.util
import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from runs import BYTES, GPT2, LLAMA, SMALL
from safetensors.torch import load_file

from kvist.base.errors import KvistError, RequestError
from kvist.models.families import load_config
from kvist.models.load import load
from kvist.runtime.request import Sampling
from kvist.text.tokenizer import Tokenizer
from kvist.train.data import read_corpus
from kvist.train.dense import DenseActivations, Dropout, row_logits
from kvist.train.loop import Interrupted, Progress, train
from kvist.train.report import CURVE, sample
from kvist.train.settings import TrainError, TrainSettings
from kvist.train.state import state_path
from kvist.train.trainer import Trainer

FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FILES |= {"training.json", "losses.csv", CURVE}


def _names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_training_learns_more_than_how_often_each_character_comes(corpus: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, steps=60, learning_rate=1e-2)
    report = train(corpus, tmp_path / "out", settings)
    read = read_corpus(corpus, settings)
    counts = Counter(read.train.tolist())
    chances = [counts[token] / len(read.train) for token in read.validation.tolist()]
    unigram = -sum(math.log(chance) for chance in chances) / len(chances)
    assert report.validation_loss < unigram - 0.5
    assert report.tokens == 60 * 4 * 32


@pytest.mark.parametrize("settings", [SMALL, GPT2], ids=["muon-dropout-short", "adamw"])
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(
    settings: TrainSettings, corpus: Path, tmp_path: Path
) -> None:
    whole = train(corpus, tmp_path / "whole", settings)
    steps = random.Random(settings.family).sample(range(1, settings.steps), 2)
    asked: list[int] = []

    def watch(progress: Progress) -> None:
        asked.append(progress.step)

    pieces = tmp_path / "pieces"
    for number, last in enumerate(sorted(steps)):
        with pytest.raises(Interrupted, match=rf"after step {last} of 12; .* --resume") as interruption:
            train(corpus, pieces, settings, resume=number > 0, observe=watch, stop=lambda: asked[-1] == last)  # noqa: B023
        assert interruption.value.exit_code == 130
        assert _names(pieces) == {".training/state.safetensors"}
    resumed = train(corpus, pieces, settings, resume=True, observe=watch)
    assert asked == list(range(1, 13))

    assert (tmp_path / "whole/model.safetensors").read_bytes() == (pieces / "model.safetensors").read_bytes()
    assert (tmp_path / "whole/losses.csv").read_bytes() == (pieces / "losses.csv").read_bytes()
    assert resumed.validation_loss == whole.validation_loss
    # Another seed gives other weights: the comparison can fail.
    train(corpus, tmp_path / "other", replace(settings, seed=2))
    assert (tmp_path / "other/model.safetensors").read_bytes() != (pieces / "model.safetensors").read_bytes()


def test_a_run_that_was_killed_goes_on_from_its_last_saved_step(corpus: Path, tmp_path: Path) -> None:
    def die(progress: Progress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "killed", SMALL, observe=die)
    steps: list[int] = []
    train(corpus, tmp_path / "killed", SMALL, resume=True, observe=lambda progress: steps.append(progress.step))
    assert steps[0] == 5  # saved every four steps
    train(corpus, tmp_path / "whole", SMALL)
    killed, whole = (tmp_path / name / "model.safetensors" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("settings", [SMALL, LLAMA, GPT2, BYTES], ids=["qwen3", "llama", "gpt2", "bytes"])
def test_transformers_loads_what_was_written_and_computes_the_same(
    settings: TrainSettings, corpus: Path, tmp_path: Path
) -> None:
    report = train(corpus, tmp_path / "out", settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(report.directory)
    words = transformers.AutoTokenizer.from_pretrained(report.directory)
    text = corpus.read_text(encoding="utf-8")
    ids = Tokenizer.load(report.directory).encode(text)
    assert words(text)["input_ids"] == ids
    assert words.decode(ids) == text

    activations = DenseActivations(Dropout(0.0))
    ours = load(report.directory, load_config(report.directory), activations)
    tokens = torch.tensor(ids[:64]).view(2, 32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(row_logits(ours, tokens, Dropout(0.0)), expected, rtol=1e-4, atol=1e-5)

    # The loss that the run reports, computed again by another implementation, window by window.
    validation = torch.tensor(ids[len(read_corpus(corpus, settings).train) :])
    total = 0.0
    for start in range(0, len(validation) - 1, settings.context):
        window = validation[start : start + settings.context + 1]
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
    assert report.validation_loss == pytest.approx(total / (len(validation) - 1), abs=1e-5)
    characters = len(text) - int(0.9 * len(text)) - 1
    assert report.validation_loss_per_character == pytest.approx(total / characters, abs=1e-5)


def test_a_finished_run_leaves_its_files_and_its_losses(corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = train(corpus, tmp_path / "out", SMALL, observe=seen.append)
    assert _names(report.directory) == FILES
    with (report.directory / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["training_loss"]) for row in rows] == pytest.approx([p.loss for p in seen], abs=1e-6)
    measured = {p.step: p.validation_loss for p in seen if p.validation_loss is not None}
    assert set(measured) == {5, 10, 12}
    assert {int(r["step"]): float(r["validation_loss"]) for r in rows if r["validation_loss"]} == pytest.approx(
        measured, abs=1e-6
    )
    facts = json.loads((report.directory / "training.json").read_text())
    assert facts["validation_loss"] == report.validation_loss == min(measured.values())
    assert facts["best_step"] == report.best_step == min(measured, key=lambda step: measured[step])
    buckets = facts["validation_loss_by_position"]
    assert sum(buckets.values()) / len(buckets) == pytest.approx(report.validation_loss, abs=0.05)
    assert report.parameters == sum(t.numel() for t in load_file(report.directory / "model.safetensors").values())
    assert (report.directory / CURVE).read_bytes().startswith(b"\x89PNG")


def test_the_weights_written_are_the_best_not_the_last(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[int, float] = {}
    step = Trainer.step

    def astray(trainer: Trainer) -> float:
        loss = step(trainer)
        if trainer.done > 20:
            for weight in trainer.model.parameters():
                weight.data.add_(torch.randn_like(weight))
        return loss

    def watch(progress: Progress) -> None:
        if progress.validation_loss is not None:
            losses[progress.step] = progress.validation_loss

    monkeypatch.setattr(Trainer, "step", astray)
    report = train(corpus, tmp_path / "out", replace(SMALL, steps=30, evaluate_every=3), observe=watch)
    assert report.best_step <= 20
    assert report.validation_loss == losses[report.best_step] < losses[30]


def test_a_sample_comes_through_the_engine_and_its_cache(corpus: Path, tmp_path: Path) -> None:
    report = train(corpus, tmp_path / "out", SMALL)
    generation = sample(report, tokens=12, sampling=Sampling())
    text = "".join(generation)
    assert generation.result().kv_blocks > 0

    # Greedy decoding without a cache: every token from a pass over all before it.
    tokenizer = Tokenizer.load(report.directory)
    model = load(report.directory, load_config(report.directory), DenseActivations(Dropout(0.0)))
    tokens = tokenizer.encode(report.prompt)
    for _ in range(12):
        logits = row_logits(model, torch.tensor([tokens]), Dropout(0.0))
        tokens.append(int(logits[0, -1].argmax()))
    assert text == tokenizer.decode(tokens[-12:])
    with pytest.raises(RequestError):
        sample(replace(report, prompt=report.prompt * 9), tokens=1, sampling=Sampling())


def test_without_matplotlib_there_is_no_curve_and_all_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = train(corpus, tmp_path / "out", SMALL)
    assert not report.curve
    assert _names(report.directory) == FILES - {CURVE}


def test_an_output_that_is_taken_is_refused_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("mine")
    for path in (taken, taken / "letter.txt"):
        with pytest.raises(TrainError, match="not an empty directory"):
            train(corpus, path, SMALL)
    assert _names(taken) == {"letter.txt"}
    with pytest.raises(Interrupted):
        train(corpus, tmp_path / "half", SMALL, stop=lambda: True)
    with pytest.raises(TrainError, match="unfinished run; go on with --resume"):
        train(corpus, tmp_path / "half", SMALL)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    write: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fills up at the first state, a later one, or the weights at the end."""
    from kvist.weights import checkpoint

    original, calls = checkpoint.save_file, []
    failing = {1: 1, 2: 3, 3: 5}[write]  # states before step 1 and after steps 4, 8 and 12; then the weights

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        original(tensors, path, metadata)
        if len(calls) == failing:
            Path(path).write_bytes(Path(path).read_bytes()[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(KvistError, match="No space left on device") as failure:
        train(corpus, tmp_path / "out", SMALL)
    assert len(calls) == failing
    assert "\n" not in str(failure.value)
    assert _names(tmp_path) - {"corpus.txt"} == (set() if write == 1 else {"out/.training/state.safetensors"})
    if write > 1:
        train(corpus, tmp_path / "out", SMALL, resume=True)
        assert state_path(tmp_path / "out").exists() is False


def test_a_loss_that_is_no_number_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "cross_entropy", lambda logits, targets, reduction="mean": logits.sum() * math.nan)
    with pytest.raises(TrainError, match="after 0 steps is not a number; lower the learning rate"):
        train(corpus, tmp_path / "out", SMALL)
