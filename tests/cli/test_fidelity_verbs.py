"""`kvist fidelity` and `kvist calibrate`: what they print, write, keep and refuse."""

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command import Kvist, Outcome
from safetensors.torch import load_file

from kvist.evals import calibrate as calibrate_module
from kvist.evals import fidelity as fidelity_module
from kvist.service import calibration as calibration_module
from kvist.service.loaded import BUNDLED

SHORT = ("--tokens", 160)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are kept here; kernels where they always are."""
    monkeypatch.setattr(calibration_module, "writable_cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text("KING:\nWhat say you now, my lord? The night is long, and all the house asleep.\n\n" * 8)
    return path


def refused(outcome: Outcome, *said: str) -> None:
    """Exit code 1, one line that says it all, nothing on stdout."""
    assert (outcome.code, outcome.out) == (1, ""), outcome
    assert outcome.err.startswith("kvist: ")
    assert outcome.err.count("\n") == 1
    for part in said:
        assert part in outcome.err


def as_json(outcome: Outcome) -> dict:
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


def test_fidelity_compares_codecs(kvist: Kvist, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "quality.png"
    outcome = kvist("fidelity", "--text", text, *SHORT, "--kv", "turbo2", "--kv", "int8", "--plot", picture)
    assert outcome.code == 0, outcome.err
    assert (
        "kvist-shakespeare · play.txt: 95 predictions behind coded blocks, of 160 tokens · against fp32" in outcome.out
    )
    assert outcome.out.index("int8") < outcome.out.index("turbo2"), "most bytes first"
    assert "1,056" in outcome.out
    assert f"picture: {picture}" in outcome.err
    assert "flatters" not in outcome.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_fidelity_without_a_text_or_a_choice(kvist: Kvist) -> None:
    outcome = kvist("fidelity", *SHORT, "--json")
    answer = as_json(outcome)
    assert [row["kv"] for row in answer["rows"]] == [*fidelity_module.DEFAULT_KV]
    assert answer["text"] == "built-in text"
    assert (answer["tokens"], answer["predictions"]) == (160, 95)
    assert all(row["choice"] == row["kv"] and row["kld_mean"] > 0 for row in answer["rows"])
    assert "has also calibrated the model" in outcome.err


def test_fidelity_of_nothing_has_no_picture(kvist: Kvist, text: Path, tmp_path: Path) -> None:
    outcome = kvist("fidelity", "--text", text, *SHORT, "--kv", "fp32", "--plot", tmp_path / "none.png", "--json")
    assert as_json(outcome)["rows"][0]["same_top1"] == 1.0
    assert "no picture" in outcome.err
    assert not (tmp_path / "none.png").exists()


def test_an_interrupted_fidelity_prints_what_it_has(kvist: Kvist, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text.write_text(text.read_text() * 3)
    compare = fidelity_module.compare

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(fidelity_module, "compare", compare)
        return compare(*arguments)

    monkeypatch.setattr(fidelity_module, "compare", interrupted)
    outcome = kvist("fidelity", "--text", text, "--length", 200, "--kv", "int8", "--json")
    assert outcome.code == 130
    assert json.loads(outcome.out)["tokens"] == 200
    assert "stopped after 200 of 1,896 tokens" in outcome.err


def test_fidelity_refusals(kvist: Kvist, text: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(kvist("fidelity", "--text", text, "--kv", "turbo9"), "no KV codec 'turbo9'", "turbo4")
    refused(kvist("fidelity", "--text", text, "--kv", "auto"), "run kvist calibrate on this model first")
    refused(kvist("fidelity", "--text", text, "--length", 5000), "5,000 tokens do not fit", "1,024")
    refused(kvist("fidelity", "--text", text, "--tokens", 60), "60 tokens hold no prediction", "66 would")
    refused(kvist("fidelity", "--text", text.parent / "none.txt"), "cannot read", "none.txt")
    refused(kvist("fidelity", model, "--text", text, "--kv", "int8"), "int8 cannot hold the stream 'k'", "not 8")
    (text.parent / "short.txt").write_text("To be.")
    refused(kvist("fidelity", "--text", text.parent / "short.txt"), "the text has 6 tokens; at least 66")
    (text.parent / "other.txt").write_bytes(b"\xff\xfe" * 99)
    refused(kvist("fidelity", "--text", text.parent / "other.txt"), "not UTF-8")
    (text.parent / "greek.txt").write_text("μῆνιν ἄειδε θεά" * 20)
    refused(kvist("fidelity", "--text", text.parent / "greek.txt"), "'μ'", "65 characters")
    (model / "tokenizer.json").unlink()
    refused(kvist("fidelity", model, "--text", text, "--kv", "bf16"), "holds neither tokenizer.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(
        kvist("fidelity", "--text", text, "--plot", "x.png"),
        "matplotlib",
        "pip install -e '.[plots]' in Kvist's checkout",
    )


def test_calibrate_proposes_what_auto_then_is(kvist: Kvist, text: Path, own_folder: Path) -> None:
    refused(kvist("run", "-p", "KING:", "--kv", "auto"), "run kvist calibrate on this model first")
    outcome = kvist("calibrate", "--json")
    answer = as_json(outcome)
    assert (answer["text"], answer["tokens"], answer["threshold"]) == ("built-in text", 1024, 0.99)
    assert Path(answer["path"]).parent == own_folder / "calibration"
    assert Path(answer["path"]).is_file()
    assert f"--kv auto is now {answer['proposal']}" in outcome.err
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    keys = answer["layers"][0]["streams"]["k"]
    for key in {*answer, *answer["layers"][0], *keys, *keys["tried"][0]}:
        assert key in documented
    assert all("correlation" not in found for layer in answer["layers"] for found in layer["streams"]["v"]["tried"])
    ran = as_json(kvist("run", "-p", "KING:\n" * 30, "--kv", "auto", "--max-tokens", 3, "--temperature", 0, "--json"))
    assert ran["kv"]["codec"] == answer["proposal"]
    assert ran["kv"]["bytes_per_token"] == answer["bytes_per_token"]
    measured = as_json(kvist("fidelity", "--text", text, *SHORT, "--kv", "auto", "--json"))
    (row,) = measured["rows"]
    assert (row["kv"], row["choice"]) == ("auto", answer["proposal"])
    assert f"\nauto: {answer['proposal']}\n" in kvist("fidelity", "--text", text, *SHORT, "--kv", "auto").out


def test_calibrate_prints_layers_and_codecs(kvist: Kvist, text: Path) -> None:
    outcome = kvist("calibrate", "--text", text, "--threshold", 0.95)
    assert outcome.code == 0, outcome.err
    assert "kvist-shakespeare · play.txt, 632 tokens · at least 0.95" in outcome.out
    for said in ("drift", "the worst layer under each codec", "int4-rot", "bits a value"):
        assert said in outcome.out


def test_an_interrupted_calibration_changes_nothing(
    kvist: Kvist, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt  # what Ctrl-C comes to; a process in the background may be deaf to the signal itself

    monkeypatch.setattr(calibrate_module, "compare_scores", interrupted)
    outcome = kvist("calibrate")
    assert (outcome.code, outcome.out) == (130, "")
    assert "nothing was changed" in outcome.err
    assert not own_folder.exists()


def test_a_calibration_is_taken_over_by_its_own_model_alone(kvist: Kvist, tmp_path: Path, own_folder: Path) -> None:
    made = as_json(kvist("calibrate", "--json"))
    given = tmp_path / "given.safetensors"
    shutil.move(made["path"], given)
    refused(kvist("run", "-p", "a", "--kv", "auto"), "run kvist calibrate")
    outcome = kvist("calibrate", "--import", given)
    assert (outcome.code, outcome.out) == (0, "")
    assert "measured on 1,024 tokens" in outcome.err
    kept, original = (load_file(path) for path in (made["path"], given))
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)
    taken = as_json(kvist("calibrate", "--import", given, "--json"))
    assert taken == {key: made[key] for key in ("model", "tokens", "proposal", "path")}
    recall = BUNDLED / "recall"
    refused(kvist("calibrate", recall, "--import", given), "given.safetensors is the calibration of another model")
    assert len([*(own_folder / "calibration").iterdir()]) == 1
    given.write_bytes(given.read_bytes()[:-40])
    refused(kvist("calibrate", "--import", given), "damaged")
    assert (
        as_json(kvist("run", "-p", "a", "--kv", "auto", "--max-tokens", 1, "--json"))["kv"]["codec"] == made["proposal"]
    )


def test_calibrate_refusals(kvist: Kvist, text: Path, tmp_path: Path) -> None:
    refused(kvist("calibrate", "--threshold", 1.5), "between 0 and 1", "1.5")
    refused(kvist("calibrate", "--threshold", 0), "between 0 and 1")
    refused(kvist("calibrate", "--text", tmp_path / "none.txt"), "cannot read")
    refused(kvist("calibrate", "--import", tmp_path / "none.safetensors"), "cannot read")
    refused(kvist("calibrate", "--import", text), "damaged")
    refused(kvist("calibrate", "--import", text, "--threshold", 0.5), "--import takes a calibration as it is")
    (tmp_path / "short.txt").write_text("To be.")
    refused(kvist("calibrate", "--text", tmp_path / "short.txt"), "at least 128 tokens; the text has 6")
