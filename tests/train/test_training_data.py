"""Which tokens a step sees, and which texts are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import SMALL

from kvist.base.errors import TextError
from kvist.train.data import read_corpus, training_rows
from kvist.train.settings import Vocabulary


def test_the_parts_are_the_text_and_nothing_of_validation_is_trained_on(corpus: Path) -> None:
    text = corpus.read_text(encoding="utf-8")
    read = read_corpus(corpus, SMALL)
    train, validation = (read.tokenizer.decode(part.tolist()) for part in (read.train, read.validation))
    assert train + validation == text
    assert len(validation) == read.validation_characters == len(read.validation)
    assert len(train) == int(0.9 * len(text))


def test_bytes_need_fewer_tokens_and_give_the_same_text(corpus: Path) -> None:
    read = read_corpus(corpus, replace(SMALL, vocabulary=Vocabulary.BYTES, vocab_size=300))
    text = corpus.read_text(encoding="utf-8")
    assert read.tokenizer.decode(read.train.tolist()) + read.tokenizer.decode(read.validation.tolist()) == text
    assert len(read.validation) < read.validation_characters
    assert read.tokenizer.get_vocab_size() == 300


def test_an_epoch_takes_every_window_once() -> None:
    settings = replace(SMALL, short_context=0, short_share=0.0, rows=4, steps=60)
    tokens = torch.arange(32 * 41 + 5)  # 40 windows of 32 after an offset: ten steps an epoch
    starts = [int(row[0]) for step in range(10) for row in training_rows(tokens, settings, step)]
    assert len(set(starts)) == 40
    assert len({start % 32 for start in starts}) == 1
    assert max(starts) - min(starts) == 39 * 32
    assert starts != sorted(starts)
    second = [int(row[0]) for step in range(10, 20) for row in training_rows(tokens, settings, step)]
    assert starts != second
    for step in (0, 19):
        rows = training_rows(tokens, settings, step)
        assert torch.equal(rows, rows[:, :1] + torch.arange(33))


def test_rows_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(3000)
    late = training_rows(tokens, SMALL, 11)
    for step in range(11):
        training_rows(tokens, SMALL, step)
    assert torch.equal(training_rows(tokens, SMALL, 11), late)
    assert not torch.equal(training_rows(tokens, replace(SMALL, seed=1), 11), late)


def test_early_steps_use_more_and_shorter_rows() -> None:
    tokens = torch.arange(3000)
    assert training_rows(tokens, SMALL, 5).shape == (8, 17)
    assert training_rows(tokens, SMALL, 6).shape == (4, 33)


def test_the_shortest_text_that_is_accepted_gives_rows() -> None:
    rows = training_rows(torch.arange(34), replace(SMALL, short_context=0, short_share=0.0), 3)
    assert rows.shape == (4, 33)
    assert set(rows[:, 0].tolist()) <= {0, 1}


def test_unusable_corpora_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "latin").write_bytes("blå".encode("latin-1"))
    (tmp_path / "short").write_text("ab" * 169 + "c")  # validation: 34 tokens, just enough
    (tmp_path / "shorter").write_text("ab" * 160)  # validation: 32
    for name, says in (
        ("absent", "does not exist"),
        (".", "is a directory"),
        ("empty", "is empty"),
        ("latin", "byte 2 is 0xe5"),
        ("shorter", "its validation part has 32 tokens and a context of 32 needs 34"),
    ):
        with pytest.raises(TextError) as refusal:
            read_corpus(tmp_path / name, SMALL)
        assert says in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert len(read_corpus(tmp_path / "short", SMALL).validation) == 34
