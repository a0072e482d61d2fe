"""A small made-up text, and runs of seconds on it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvist.train.settings import Method, TrainSettings

WORDS = [
    "the",
    "king",
    "and",
    "queen",
    "of",
    "a",
    "cold",
    "hill",
    "went",
    "down",
    "to",
    "see",
    "old",
    "rivers",
]

SMALL = TrainSettings(
    family="qwen3",
    layers=2,
    heads=4,
    kv_heads=2,
    hidden_size=32,
    intermediate_size=48,
    context=32,
    rows=4,
    steps=12,
    learning_rate=5e-3,
    final_learning_rate=0.0,
    warmup_steps=2,
    method=Method.MUON,
    dropout=0.1,
    short_context=16,
    short_steps=6,
    evaluate_every=5,
    save_every=4,
)
GPT2 = replace(SMALL, family="gpt2", kv_heads=4, method=Method.ADAMW, dropout=0.0, short_context=0, short_steps=0)


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
