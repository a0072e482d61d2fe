"""Hostile and absurd metadata of GGUF files: each ends soon, in a model or in one short line."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Type
from gguf_tiny import metadata_of, write

from kvist.base.errors import KvistError
from kvist.service.gguf import open_gguf
from kvist.service.sampling import read_proposed
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import TOKENIZER, Tokenizer

INPUTS = 250
SECONDS = 10  # of this process, whatever others do
LENGTH = 400
HOSTILE: list[tuple[Any, Type]] = [
    *[(number, Type.INT64) for number in (0, 1, -1, 7, 2**31, 2**62, -(2**63))],
    (2**64 - 1, Type.UINT64),
    *[(number, Type.FLOAT64) for number in (0.0, -1.0, 1e308, float("nan"), float("inf"), 1e-320)],
    (True, Type.BOOL),
    *[(text, Type.STRING) for text in ("", "x" * 200_000, "a\nb" * 300, "\u2581" * 5000, "{% for %}", "none", "yarn")],
    *[(items, Type.ARRAY) for items in ([0], [-1, 2**31 - 1], [1.5], ["a"], ["a", "a"], ["x" * 200_000], ["y"] * 3000)],
    (list(range(70_000)), Type.ARRAY),
    ([str(number) for number in range(5000)], Type.ARRAY),
]


def outcome(path: Path) -> str:
    """What became of one file: "opened", or its refusal."""
    began = time.process_time()
    try:
        model = open_gguf(path)
        if (model.directory / TOKENIZER).is_file():
            Tokenizer.load(model.directory).encode("ab a")
        read_proposed(model.directory)
        ChatTemplate.load(model.directory)
        found = "opened"
    except KvistError as error:
        found = str(error)
    assert time.process_time() - began < SECONDS
    assert "\n" not in found
    assert len(found) <= LENGTH, found
    return found


def fuzz(folder: Path, inputs: int, seed: int) -> list[str]:
    generator, found = random.Random(seed), []
    for number in range(inputs):
        facts = metadata_of(generator.choice(["gpt2", "llama", "gemma4"]))
        for _ in range(generator.choice([1, 1, 1, 2])):
            key = generator.choice([*facts, "llama.unheard.of", "llama." + "k" * 3000])
            if generator.random() < 0.1:
                facts.pop(key, None)
            else:
                facts[key] = generator.choice(HOSTILE)
        found.append(outcome(write(folder / f"{number}.gguf", facts, 32)))
        (folder / f"{number}.gguf").unlink()
    return found


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.service.gguf.writable_cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_files_are_whole_before_they_are_spoiled(kind: str, tmp_path: Path) -> None:
    assert outcome(write(tmp_path / "x.gguf", metadata_of(kind), 32)) == "opened"


def test_hostile_metadata(tmp_path: Path) -> None:
    found = fuzz(tmp_path, INPUTS, seed=7)
    assert 0 < found.count("opened") < INPUTS / 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma4"])
def test_a_token_of_a_novels_length(kind: str, tmp_path: Path) -> None:
    """Where merges are found by cutting tokens, that would take minutes."""
    facts = metadata_of(kind)
    tokens = facts["tokenizer.ggml.tokens"][0]
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 100_000], Type.ARRAY)
    assert "a token has at most 1,024 characters" in outcome(write(tmp_path / "x.gguf", facts, 32))
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 512], Type.ARRAY)
    assert outcome(write(tmp_path / "y.gguf", facts, 32)) == "opened"
