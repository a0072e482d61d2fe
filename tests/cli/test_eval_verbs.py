"""`kvist eval` and the recall preset of `kvist train`: what they print, write and refuse."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from command import Kvist

from kvist.train import recall as recipe

RECALL = ["eval", "recall", "--length", "128,256", "--questions", 32]
TEXT = "the quick brown fox jumps over the lazy dog and runs away. " * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


def test_recall_compares_codecs(kvist: Kvist, tmp_path: Path) -> None:
    outcome = kvist(*RECALL, "--kv", "fp32", "--kv", "bf16", "--plot", tmp_path / "recall.png")
    assert outcome.code == 0, outcome.err
    assert "kvist-recall: 64 questions" in outcome.out
    assert "tokens read from the cache: 95, 191" in outcome.out
    assert outcome.out.count("\nbf16 ") == 3
    assert f"picture: {tmp_path / 'recall.png'}" in outcome.err
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_recall_json(kvist: Kvist) -> None:
    answer = json.loads(kvist(*RECALL, "--json").out)
    assert answer["model"] == "kvist-recall"
    (row,) = answer["rows"]
    assert (row["kv"], row["bits_per_value"], row["bytes_per_token"]) == ("bf16", 16, 1024)
    assert row["accuracy"] >= 0.95
    assert [length["length"] for length in row["by_length"]] == [128, 256]
    assert len(row["by_depth"]) == 8


def test_recall_refusals(kvist: Kvist, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for said, arguments in {
        "'many'": ["--length", "many"],
        "2,048 do not fit": ["--length", "2048"],
        "no KV codec 'int0'": ["--kv", "int0"],
        "no recall model": [model],
    }.items():
        outcome = kvist("eval", "recall", *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
        assert said in outcome.err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    outcome = kvist("eval", "recall", "--plot", "x.png")
    assert outcome.code == 1
    assert "pip install -e '.[plots]' in Kvist's checkout" in outcome.err


def test_needle_over_a_model_of_letters(kvist: Kvist, text: Path) -> None:
    outcome = kvist("eval", "needle", "--text", text, "--trials", 1, "--length", "256")
    assert outcome.code == 0, outcome.err
    assert "kvist-shakespeare: a number in words within fox.txt" in outcome.out
    answer = json.loads(kvist("eval", "needle", "--text", text, "--trials", 1, "--length", "256", "--json").out)
    assert answer["spelling"] == "words"
    assert [cell["depth"] for cell in answer["rows"][0]["cells"]] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_needle_refusals(kvist: Kvist, model: Path, text: Path, tmp_path: Path) -> None:
    for said, arguments in {
        "No such file": ["--text", tmp_path / "none.txt"],
        "is not among the 27 characters": [model, "--text", text],
        "context has 1,024 tokens; 4,096 do not fit": ["--text", text, "--length", "4096"],
        "takes numbers of tokens": ["--text", text, "--length", "0"],
    }.items():
        outcome = kvist("eval", "needle", *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
        assert said in outcome.err


def test_train_recall(kvist: Kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = recipe.RecallSettings(
        stages=(recipe.Stage(32, 4, 0.5),), tokens_per_step=64, evaluate_every=2, final_steps=2, mastered=0.0
    )
    monkeypatch.setattr(recipe, "RecallSettings", lambda seed=0: replace(tiny, seed=seed))
    monkeypatch.setattr(recipe, "_QUESTIONS", 8)
    monkeypatch.setattr(recipe, "_LAST_QUESTIONS", 8)
    outcome = kvist("train", "--preset", "recall", "-o", tmp_path / "out", "--seed", 5)
    assert outcome.code == 0, outcome.err
    assert "step 2 · 4 pairs in 32 tokens (stage 1 of 1)" in outcome.err
    assert "459,392 parameters · 256 tokens" in outcome.err
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["seed"] == 5
    answer = json.loads(kvist("train", "--preset", "recall", "-o", tmp_path / "again", "--json").out)
    assert (answer["preset"], answer["steps"], answer["directory"]) == ("recall", 4, str(tmp_path / "again"))


def test_train_recall_refusals(kvist: Kvist, text: Path, tmp_path: Path) -> None:
    for said, arguments in {
        "only --out and --seed go with it": [text, "--preset", "recall"],
        "trains on a text; name one": ["--preset", "nanogpt"],
        "recall": ["--preset", "huge", text],
    }.items():
        outcome = kvist("train", *arguments, "-o", tmp_path / "out")
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
        assert said in outcome.err
        assert not (tmp_path / "out").exists()
