"""Hostile and absurd metadata of GGUF files: each ends soon, in a model or in one short line."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Type
from gguf_tiny import metadata_of, write

from hostile import compile_once, ends, fuzz
from kvist.base.errors import TextError, WeightsError
from kvist.service.gguf import open_gguf
from kvist.service.sampling import read_proposed
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import TOKENIZER, Tokenizer

INPUTS = 250
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


def read(path: Path) -> None:
    """All that is read of a file before its first token."""
    model = open_gguf(path)
    if (model.directory / TOKENIZER).is_file():
        Tokenizer.load(model.directory).encode("ab a")
    read_proposed(model.directory)
    ChatTemplate.load(model.directory)


def spoiled(generator: random.Random) -> dict[str, tuple[Any, Type]]:
    facts = metadata_of(generator.choice(["gpt2", "llama", "gemma4"]))
    for _ in range(generator.choice([1, 1, 1, 2])):
        key = generator.choice([*facts, "llama.unheard.of", "llama." + "k" * 3000])
        if generator.random() < 0.1:
            facts.pop(key, None)
        else:
            facts[key] = generator.choice(HOSTILE)
    return facts


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.service.gguf.writable_cache_folder", lambda: tmp_path / "cache")
    compile_once(monkeypatch)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_files_are_whole_before_they_are_spoiled(kind: str, tmp_path: Path) -> None:
    assert ends(lambda: read(write(tmp_path / "x.gguf", metadata_of(kind), 32)))


def test_hostile_metadata(tmp_path: Path) -> None:
    def prepare(generator: random.Random) -> Callable[[], object]:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        path = write(tmp_path / "x.gguf", spoiled(generator), 32)
        return lambda: read(path)

    assert 0 < fuzz("GGUF metadata", INPUTS, prepare) < 0.5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma4"])
def test_a_token_of_a_novels_length(kind: str, tmp_path: Path) -> None:
    """Where merges are found by cutting tokens, that would take minutes."""
    facts = metadata_of(kind)
    tokens = facts["tokenizer.ggml.tokens"][0]
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 100_000], Type.ARRAY)
    with pytest.raises((TextError, WeightsError), match="a token has at most 1,024 characters"):
        read(write(tmp_path / "x.gguf", facts, 32))
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 512], Type.ARRAY)
    assert ends(lambda: read(write(tmp_path / "y.gguf", facts, 32)))
