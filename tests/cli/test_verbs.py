"""The other verbs: what they print, write and refuse."""

import json
import os
from pathlib import Path

import pytest
import typer
from command import CONFIG, Kvist

from kvist.cache.store import Store
from kvist.cache.view import PagedView
from kvist.cli.app import app

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
    assert outcome.out.count("equal") == 8
    assert outcome.out.count(" near ") == 1
    assert "DIFFERS" not in outcome.out
    answer = json.loads(kvist("verify", model, "--steps", 2, "--trials", 1, "--json").out)
    assert answer["passed"] is answer["exact"] is True
    assert [set(check) for check in answer["checks"]] == [{"name", "kind", "passed", "compared", "evidence"}] * 9
    assert [check["kind"] for check in answer["checks"]] == ["exact"] * 8 + ["nearly"]


def test_verify_exits_with_1_when_the_cache_is_broken(
    kvist: Kvist, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "copy", lambda self, copies: None)
    outcome = kvist("verify", model, "--steps", 2, "--trials", 3)
    assert outcome.code == 1
    assert outcome.out.count("DIFFERS") == 2
    answer = kvist("verify", model, "--steps", 2, "--trials", 3, "--json")
    assert answer.code == 1
    assert json.loads(answer.out)["passed"] is json.loads(answer.out)["exact"] is False


def test_verify_exits_with_3_when_no_bit_differs_and_plain_attention_is_far(
    kvist: Kvist, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = PagedView.attend
    monkeypatch.setattr(PagedView, "attend", lambda self, q, scale, tie=None: attend(self, q, scale * 1.5, tie))
    outcome = kvist("verify", model, "--steps", 2, "--trials", 1)
    assert outcome.code == 3
    assert (outcome.out.count("equal"), outcome.out.count("FAR")) == (8, 1)
    assert "no bit differs" in outcome.err
    answer = json.loads(kvist("verify", model, "--steps", 2, "--trials", 1, "--json").out)
    assert (answer["passed"], answer["exact"]) == (False, True)


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


@pytest.mark.parametrize("verb", ["run -p a", "verify --steps 1 --trials 1", "trace -p a", "calibrate", "chat -p a"])
def test_threads(kvist: Kvist, model: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setattr("kvist.cli.process.os.cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    name, *options = verb.split()
    for wrong in (0, 7):
        outcome = kvist(name, model, *options, "--threads", wrong)
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == f"kvist: --threads takes a number from 1 to 6, the cores of this machine; got {wrong}\n"
    assert asked == []
    kvist(name, model, *options, "--threads", 3)
    assert asked == [3]
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_every_verb_that_computes_takes_threads() -> None:
    root = typer.main.get_command(app)
    others = {"explain", "tax", "plan", "convert", *(f"context {name}" for name in root.commands["context"].commands)}
    others |= {f"cache {name}" for name in root.commands["cache"].commands}
    others -= {"context create", "context import"}
    found = {}
    for name, command in root.commands.items():
        for inner, verb in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = any(option.name == "threads" for option in verb.params)
    assert {name for name, takes in found.items() if not takes} == others


def test_plan_leaves_out_codecs_that_do_not_fit(kvist: Kvist, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 24}))
    outcome = kvist("plan", tmp_path)
    assert outcome.code == 0
    left = [line for line in outcome.out.splitlines() if line.startswith("left out: ")]
    assert [line.split()[2] for line in left] == ["int8", "turbo4", "turbo3", "turbo2"]
    assert all("not 24" in line for line in left)
    found = json.loads(kvist("plan", tmp_path, "--json").out)
    assert {row["kv"] for row in found["rows"]} == {"bf16"}
    assert list(found["left_out"]) == ["int8", "turbo4", "turbo3", "turbo2"]
    assert "no KV codec 'nonsense'" in kvist("plan", tmp_path, "--kv", "nonsense").err
