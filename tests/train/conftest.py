"""A small made-up text, and one thread to train on it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

WORDS = ["the", "king", "and", "queen", "of", "a", "cold", "hill", "went", "down", "to", "see", "old", "rivers"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """About 4,000 characters of sentences, with a few that are no ASCII."""
    chooser = random.Random(0)
    sentences = [" ".join(chooser.choices(WORDS, k=8)) + chooser.choice([".\n", "!\n", " – å.\n"]) for _ in range(110)]
    path = tmp_path / "corpus.txt"
    path.write_text("".join(sentences), encoding="utf-8")
    return path
