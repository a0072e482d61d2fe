"""The recall task is what it says it is, and its recipe learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvist.base.errors import RequestError
from kvist.service.loaded import open_model
from kvist.text.recall import BEGIN, FIRST_KEY, FIRST_NOISE, FIRST_VALUE, MOST_PAIRS, QUERY, VOCAB_SIZE, recall_batch
from kvist.train import recall as recipe
from kvist.train.recall import (
    RecallProgress,
    RecallSettings,
    RecallTrainer,
    Stage,
    answered_batch,
    repeated_batch,
    train_recall,
)
from kvist.train.settings import TrainError

SHORT = Stage(32, 4, 0.9)
TINY = RecallSettings(
    stages=(SHORT, Stage(64, 8, 0.3)), tokens_per_step=128, evaluate_every=2, final_steps=4, mastered=0.0
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "pairs"), [(128, 16), (1024, 128), (40, 1), (33, 7), (764, MOST_PAIRS)])
def test_every_answer_stands_behind_its_key_in_the_context(length: int, pairs: int) -> None:
    batch = recall_batch(3, length, pairs, seeded())
    assert batch.tokens.shape == (3, length)
    assert batch.context == length - 1 - 2 * pairs
    questions = batch.questions.tolist()
    assert len(questions) == pairs
    for row, places, answers in zip(batch.tokens.tolist(), batch.places.tolist(), batch.answers.tolist(), strict=True):
        context, block = row[: batch.context], row[batch.context :]
        assert (context[0], block[0]) == (BEGIN, QUERY)
        noise = set(range(1, batch.context)) - {place + step for place in places for step in (0, 1)}
        assert all(FIRST_NOISE <= context[place] < VOCAB_SIZE for place in noise)
        assert sum(FIRST_KEY <= token < FIRST_VALUE for token in context) == pairs
        assert sum(FIRST_VALUE <= token < FIRST_NOISE for token in context) == pairs
        # What a reader of the context alone would know.
        known = {context[place]: context[place + 1] for place in places}
        assert len(known) == pairs
        assert [known[row[question]] for question in questions] == answers == block[2::2]
        assert [context[place] for place in places] == [row[question] for question in questions]


def test_pairs_stand_everywhere_and_are_asked_in_another_order() -> None:
    batch = recall_batch(200, 128, 16, seeded())
    assert set(batch.places.flatten().tolist()) == set(range(1, 94, 2))
    assert (batch.places != batch.places.sort(-1).values).any()


def test_a_seed_makes_the_same_sequences_and_another_seed_others() -> None:
    ours = recall_batch(2, 64, 8, seeded(5))
    assert torch.equal(ours.tokens, recall_batch(2, 64, 8, seeded(5)).tokens)
    assert not torch.equal(ours.tokens, recall_batch(2, 64, 8, seeded(6)).tokens)


@pytest.mark.parametrize(("length", "pairs"), [(64, 0), (33, 8), (4096, MOST_PAIRS + 1)])
def test_sequences_that_cannot_be_are_refused(length: int, pairs: int) -> None:
    with pytest.raises(RequestError, match=f"do not hold {pairs} pairs"):
        recall_batch(1, length, pairs, seeded())


def test_only_answers_are_learned_from() -> None:
    tokens, targets = answered_batch(4, Stage(64, 8, 0.0), seeded())
    batch = recall_batch(4, 64, 8, seeded())
    assert torch.equal(tokens, batch.tokens)
    assert torch.equal(targets[:, batch.questions], batch.answers)
    assert int((targets != -100).sum()) == 4 * 8


@pytest.mark.parametrize("seed", range(5))
def test_a_repetition_is_learned_from_to_its_last_token(seed: int) -> None:
    tokens, targets = repeated_batch(3, 64, seeded(seed))
    first = int((targets[0] != -100).nonzero()[0])
    assert 8 <= first < 32
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[0] == BEGIN
        for place in range(64):
            if first <= place < 63:
                # The token after `place` stood one segment earlier.
                assert wanted[place] == row[place + 1] == row[place + 1 - first]
            else:
                assert wanted[place] == -100


def test_a_short_run_lowers_the_loss() -> None:
    trainer = RecallTrainer(RecallSettings(tokens_per_step=192))
    losses = [trainer.step(SHORT) for _ in range(80)]
    assert sum(losses[:10]) / 10 > 6.1  # 512 tokens, equally likely: 6.2 nats
    assert sum(losses[-10:]) / 10 < 5.9
    assert 0 <= trainer.accuracy(SHORT, 1, 100) <= 0.5


def test_a_run_is_decided_by_its_seed() -> None:
    trainers = [RecallTrainer(RecallSettings(seed=seed, tokens_per_step=128)) for seed in (3, 3, 4)]
    losses = [[trainer.step(SHORT) for _ in range(6)] for trainer in trainers]
    assert losses[0] == losses[1] != losses[2]
    same, other = (
        all(torch.equal(*pair) for pair in zip(trainers[0].model.parameters(), trainer.model.parameters(), strict=True))
        for trainer in trainers[1:]
    )
    assert same
    assert not other


def test_a_run_writes_a_checkpoint_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_QUESTIONS", 64)
    monkeypatch.setattr(recipe, "_LAST_QUESTIONS", 64)
    seen: list[RecallProgress] = []
    report = train_recall(tmp_path / "out", TINY, seen.append)
    # Two steps to each measurement, which a threshold of 0 always passes, and four at the end.
    assert [progress.step for progress in seen] == list(range(1, 9))
    assert [progress.stage for progress in seen] == [1, 1, 2, 2, 2, 2, 2, 2]
    assert [stage.steps for stage in report.stages] == [2, 4]
    assert (report.steps, report.tokens, report.parameters) == (8, 8 * 128, 459_392)
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["settings"]["stages"][0] == {"length": 32, "pairs": 4, "repeats": 0.9}
    assert facts["accuracy"] == report.accuracy
    config = open_model(str(tmp_path / "out")).config
    assert (config.layers, config.kv_heads, config.head_dim, config.vocab_size) == (2, 2, 64, VOCAB_SIZE)
    with pytest.raises(TrainError, match="not an empty directory"):
        train_recall(tmp_path / "out", TINY)


def test_what_is_never_mastered_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"after 3 steps stage 1 of 2 \(4 pairs in 32 tokens\) is not mastered"):
        train_recall(tmp_path / "out", replace(TINY, mastered=1.0, most_steps=3))
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainError, match="a seed is"):
        RecallSettings(seed=-1)
