"""The other verbs: what they print, write and refuse."""

import json
from pathlib import Path

import pytest
from command import Kvist

from kvist.cache.store import Store

TEXT = "the quick brown fox jumps over the lazy dog and runs away. " * 40
SMALL = [
    *("--preset", "nanogpt", "--steps", 4),
    *(
        part
        for change in ("context=16", "rows=2", "layers=1", "heads=2", "kv_heads=2", "hidden_size=16")
        for part in ("--set", change)
    ),
    *("--set", "intermediate_size=32"),
]


def test_verify_prints_a_table_and_json(kvist: Kvist, model: Path) -> None:
    outcome = kvist("verify", model, "--steps", 2, "--trials", 1)
    assert outcome.code == 0
    assert outcome.out.count("equal") == 9
    assert "DIFFERS" not in outcome.out
    answer = json.loads(kvist("verify", model, "--steps", 2, "--trials", 1, "--json").out)
    assert answer["passed"] is True
    assert [set(check) for check in answer["checks"]] == [{"name", "passed", "compared", "evidence"}] * 9


def test_verify_exits_with_1_when_the_cache_is_broken(
    kvist: Kvist, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "copy", lambda self, copies: None)
    outcome = kvist("verify", model, "--steps", 2, "--trials", 3)
    assert outcome.code == 1
    assert outcome.out.count("DIFFERS") == 2
    answer = kvist("verify", model, "--steps", 2, "--trials", 3, "--json")
    assert answer.code == 1
    assert json.loads(answer.out)["passed"] is False


def test_trace(kvist: Kvist, model: Path) -> None:
    outcome = kvist("trace", model, "-p", "abc")
    assert outcome.code == 0
    assert "prefill: 3 tokens" in outcome.out
    assert "decode: 1 token" in outcome.out
    answer = json.loads(kvist("trace", model, "-p", "abc", "--json").out)
    assert [step["tokens"] for step in answer["steps"]] == [3, 4]
    assert "'Ü'" in kvist("trace", model, "-p", "Ü").err
    assert "1 to 127 tokens" in kvist("trace", model, "-p", "a" * 128).err


def test_train_writes_a_model_that_runs(kvist: Kvist, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    outcome = kvist("train", corpus, "-o", tmp_path / "out", *SMALL)
    assert outcome.code == 0, outcome.err
    assert "validation loss" in outcome.err
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    ran = kvist("run", tmp_path / "out", "-p", "the ", "--max-tokens", 5, "--json")
    assert len(json.loads(ran.out)["tokens"]) == 5


def test_train_json(kvist: Kvist, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    answer = json.loads(kvist("train", tmp_path / "corpus.txt", "-o", tmp_path / "out", *SMALL, "--json").out)
    assert answer["directory"] == str(tmp_path / "out")
    assert answer["preset"] == "nanogpt"
    assert answer["tokens"] == 4 * 2 * 16
    assert 0 < answer["validation_loss"] < 5


def test_train_refusals(kvist: Kvist, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("tiny")
    for said, arguments in {
        "no preset 'huge'": ["--preset", "huge"],
        "no setting 'depth'": ["--set", "depth=3"],
        "layers should be of type int, got 'many'": ["--set", "layers=many"],
        "corpus.txt": SMALL,
    }.items():
        outcome = kvist("train", corpus, "-o", out, *arguments)
        assert (outcome.code, outcome.out) == (1, "")
        assert said in outcome.err
        assert outcome.err.count("\n") == 1
        assert not out.exists()


def test_convert_refuses_what_is_no_checkpoint(kvist: Kvist, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x01\x02")
    outcome = kvist("convert", tmp_path / "model.bin", "-o", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bench_refuses_what_is_no_number(kvist: Kvist) -> None:
    outcome = kvist("bench", "attention", "--context", "many")
    assert outcome.code == 1
    assert "'many'" in outcome.err
    assert "smollm2-135m" in kvist("bench", "attention", "--shape", "gpt-5").err
