"""Real weights, as a user meets them: the bundled model, and stories260K converted."""

import json
from pathlib import Path

import pytest
from command import Kvist

from kvist.service.loaded import BUNDLED


def passes(kvist: Kvist, *arguments: object) -> None:
    outcome = kvist("verify", *arguments, "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    answer = json.loads(outcome.out)
    assert answer["passed"] is True
    evidence = {check["name"]: check["evidence"] for check in answer["checks"]}
    # Decoding read several blocks from the cache.
    assert evidence["greedy: cached = recomputed"]["blocks_read_from_cache"] > 1


@pytest.mark.parametrize("kv", ["fp32", "bf16", "fp16"])
def test_verify_passes_on_the_bundled_model(kvist: Kvist, kv: str) -> None:
    passes(kvist, "--steps", 6, "--trials", 2, "--kv", kv)


def test_the_bundled_model_writes_a_play(kvist: Kvist) -> None:
    outcome = kvist("run", "-p", "ROMEO:", "--max-tokens", 400, "--temperature", 0.7, "--seed", 1, "--json")
    answer = json.loads(outcome.out)
    assert answer["finish_reason"] == "length"
    words = answer["text"].split()
    common = {"the", "and", "to", "of", "I", "my", "you", "a", "that", "in", "is", "not", "me", "your", "with", "thou"}
    assert sum(word in common for word in words) > len(words) / 8
    # Somebody else speaks, too: a name in capitals and a colon on a line of their own.
    assert any(line.endswith(":") and line.isupper() for line in answer["text"].splitlines())


def test_the_bundled_model_is_small_and_long_enough() -> None:
    assert sum(file.stat().st_size for file in BUNDLED.iterdir()) <= 8_000_000
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["max_position_embeddings"] >= 1024
    card = (BUNDLED / "README.md").read_text()
    for said in ("Tiny Shakespeare", "kvist train", "validation loss"):
        assert said.lower() in card.lower()


def test_stories_are_converted_verified_and_told(kvist: Kvist, shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "stories"
    assert kvist("convert", shared_data / "stories260K", "-o", out).code == 0
    passes(kvist, out, "--steps", 6, "--trials", 2)
    told = kvist("run", out, "-p", "Once upon a time", "--temperature", 0, "--max-tokens", 60)
    assert told.out.startswith("Once upon a time, there was a little girl named Lily. She loved to play")
