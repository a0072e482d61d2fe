"""Calibration: what is measured, what is proposed, and which files are taken for a model's own."""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fidelity import SMALL, ids, own_folder, random_model  # noqa: F401
from test_verify import LLAMA
from test_verify import random_model as narrow_model

from kvist.base.errors import ConfigError, RequestError, TextError
from kvist.cache.calibration import Calibration, StreamStatistics, save_calibration, statistics
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import CODECS
from kvist.evals.calibrate import CalibrationReport, calibrate, compact, mean_and_drift
from kvist.service.calibration import (
    calibrated,
    calibration_path,
    calibration_text,
    measure,
    observe,
    read_calibration,
)
from kvist.service.digest import model_digest
from kvist.service.loaded import BUNDLED, Loaded, open_model

names = st.sampled_from(["turbo2", "turbo2.5", "turbo4", "int4-rot", "int8", "bf16"])


streams = st.sampled_from([("k", "v"), ("rope", "latent"), ("kv",), ()])


@given(st.lists(streams.flatmap(lambda found: st.fixed_dictionaries(dict.fromkeys(found, names))), max_size=40))
def test_a_compact_choice_means_the_assignment(layers: list[dict[str, str]]) -> None:
    assignment: dict[str, dict[int, str]] = {}
    for number, layer in enumerate(layers):
        for name, codec in layer.items():
            assignment.setdefault(name, {})[number] = codec
    if not assignment:
        return
    choice = parse_choice(compact(assignment))
    assert [{name: choice.codec(i, name).name for name in layer} for i, layer in enumerate(layers)] == layers


def test_choices_are_compact() -> None:
    def of(**streams: list[str]) -> str:
        return compact({name: dict(enumerate(codecs)) for name, codecs in streams.items()})

    assert of(k=["turbo4"] * 9, v=["turbo4"] * 9) == "turbo4"
    assert of(k=["turbo4"] * 9, v=["turbo3"] * 9) == "k=turbo4,v=turbo3"
    keys = ["turbo4"] * 2 + ["turbo3"] * 27 + ["int8"]
    values = ["turbo3"] * 29 + ["turbo2"]
    assert of(k=keys, v=values) == "turbo3,0-1:k=turbo4,29:k=int8,29:v=turbo2"
    # Layers without the stream do not divide a run.
    assert compact({"k": {0: "int8", 2: "int8", 4: "turbo4", 6: "int8", 7: "turbo4", 9: "turbo4", 11: "turbo4"}}) == (
        "turbo4,0-2:k=int8,6:k=int8"
    )


def test_mean_and_drift_by_numpy() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    keys = random.normal(size=(300, 2, 32))
    keys[:, 0] += 3.0
    keys[:, 1] += np.linspace(-1, 1, 300)[:, None]
    found = torch.tensor(keys).float()
    mean, drift = mean_and_drift(found, statistics(found))
    sigma = np.sqrt(((keys - keys.mean(0)) ** 2).sum(-1).mean(0))
    assert mean == pytest.approx((np.linalg.norm(keys.mean(0), axis=-1) / sigma).max(), rel=1e-5)
    moved = keys.reshape(3, 100, 2, 32).mean(1) - keys.mean(0)
    assert drift == pytest.approx((np.linalg.norm(moved, axis=-1) / sigma).max(), rel=1e-5)
    assert drift > 0.5
    # Without the trend what is left is chance.
    assert mean_and_drift(found[:, :1], statistics(found[:, :1]))[1] < 0.15
    still = torch.ones(90, 2, 32)
    assert mean_and_drift(still, statistics(still)) == (0.0, 0.0)


def proposed(base: Loaded, threshold: float, tokens: int = 320) -> tuple[Calibration, CalibrationReport]:
    return calibrate(base, ids(tokens), "random", threshold)


def test_the_cheapest_codec_that_is_good_enough() -> None:
    base = random_model()
    calibration, report = proposed(base, 0.99)
    assert [layer.layer for layer in report.layers] == [0, 1]
    for layer in report.layers:
        keys, values = layer.streams["k"], layer.streams["v"]
        for tried, chosen in ((keys.tried, keys.chosen), (values.tried, values.chosen)):
            assert [found.bits for found in tried] == sorted(found.bits for found in tried)
            assert {"turbo2", "turbo4", "int8", "bf16", "fp32"} <= {found.codec for found in tried}
            assert not any(found.codec.startswith("paper") for found in tried), "no kernel reads these"
            assert chosen.quality >= 0.99
            assert all(found.quality < 0.99 for found in tried if found.bits < chosen.bits)
            # In heads of 32 int4 and turbo4 take the same bits.
            assert all(found.quality <= chosen.quality for found in tried if found.bits == chosen.bits)
        assert all(found.correlation is not None for found in keys.tried)
        assert all(found.correlation is None for found in values.tried)
        assert values.mean is None
    choice = parse_choice(report.proposal)
    for layer in report.layers:
        for name, stream in layer.streams.items():
            assert choice.codec(layer.layer, name).name == stream.chosen.codec
    assert calibration.proposal == report.proposal
    dearer, cheaper = proposed(base, 0.9999)[1], proposed(base, 0.9)[1]
    assert cheaper.bytes_per_token < report.bytes_per_token < dearer.bytes_per_token
    # What changes nothing is all that is left at 1.
    assert proposed(base, 1.0)[1].proposal == "fp32"


def test_keys_that_share_a_mean_are_given_codecs_that_take_it_off() -> None:
    report = proposed(random_model(shift=12.0), 0.98)[1]
    for layer in report.layers:
        keys = layer.streams["k"]
        assert keys.mean is not None
        assert keys.mean > 3
        quality = {found.codec: found.quality for found in keys.tried}
        assert quality["turbo4"] > 0.98 > quality["int4-rot"]
        assert CODECS[keys.chosen.codec].centred


def test_sharp_attention_asks_for_better_keys() -> None:
    """Scores keep their correlation when queries grow, and the softmax over them does not keep its weights."""
    base, sharp = random_model(), random_model()
    with torch.no_grad():
        for block in sharp.model.blocks:
            block.attention.qkv.weight[: SMALL.heads * SMALL.head_dim] *= 6
    found, of_sharp = (proposed(model, 0.99)[1].layers[0] for model in (base, sharp))
    turbo2, of_sharp_turbo2 = found.streams["k"].tried[0], of_sharp.streams["k"].tried[0]
    assert of_sharp_turbo2.correlation == pytest.approx(turbo2.correlation, abs=0.01)
    assert 1 - of_sharp_turbo2.output > 5 * (1 - turbo2.output)


def test_heads_that_no_codec_can_hold_stay_as_they_are() -> None:
    report = calibrate(narrow_model(LLAMA), ids(200), "random")[1]
    assert {found.codec for found in report.layers[0].streams["k"].tried} == {"bf16", "fp32"}
    assert report.proposal == "bf16"


def test_what_cannot_be_calibrated() -> None:
    base = random_model()
    for threshold in (0.0, 1.01, float("nan")):
        with pytest.raises(RequestError, match="a threshold lies between 0 and 1"):
            proposed(base, threshold)
    with pytest.raises(RequestError, match="at least 128 tokens; the text has 100"):
        proposed(base, 0.9, tokens=100)


def digest_of(loaded: Loaded) -> str:
    return model_digest(loaded.model, loaded.weights_digest())


def test_auto_is_the_proposal() -> None:
    base = random_model()
    calibration, report = proposed(base, 0.98)
    save_calibration(calibration_path(calibration.model), calibration)
    layout = base.with_kv("auto").layout
    assert layout.kv == report.proposal
    assert layout.bytes_per_token == report.bytes_per_token
    keys, _ = layout.layers[1].streams
    assert torch.equal(keys.frame.mean, calibration.streams[1]["k"].mean)


def test_statistics_are_of_the_models_own_vectors() -> None:
    base, seen = random_model(), {}
    observe(base.model, ids(100), seen.__setitem__)
    found = measure(base.model, ids(100), "digest")
    assert found.tokens == 100
    for layer, streams in enumerate(found.streams):
        for name, x in (("k", seen[layer].k), ("v", seen[layer].v)):
            assert torch.allclose(streams[name].mean, x.mean(0), atol=1e-6)
            assert torch.allclose(streams[name].energy, x.var(0, correction=0), rtol=1e-4)


def test_a_first_use_is_announced_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    base = random_model()
    calibrated(base.model, Path("somewhere/tiny"), base.weights_digest())
    assert capsys.readouterr().err == ""
    calibration_path(digest_of(base)).unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    calibrated(base.model, Path("somewhere/tiny"), base.weights_digest())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "keys and values of tiny (once)" in said
    calibrated(base.model, Path("somewhere/tiny"), base.weights_digest())
    assert capsys.readouterr().err == ""


def test_texts_to_calibrate_on(tmp_path: Path) -> None:
    bundled = open_model(None)
    tokens, name = calibration_text(bundled.model, BUNDLED)
    assert (len(tokens), name) == (1024, "built-in text")
    assert bundled.tokenizer().decode(tokens).startswith("The harbour was quiet when the ferry came in.")
    assert len(calibration_text(bundled.model, BUNDLED, "to be or not " * 3)[0]) == 39
    with pytest.raises(TextError, match="'/'"):
        calibration_text(bundled.model, BUNDLED, "either/or")
    arbitrary, name = calibration_text(bundled.model, tmp_path)
    assert (len(arbitrary), name) == (1024, "arbitrary tokens")
    assert 0 <= min(arbitrary) < max(arbitrary) < 65
    with pytest.raises(TextError):
        calibration_text(bundled.model, tmp_path, "to be")


def changed(calibration: Calibration, layer: int, stream: str, value: StreamStatistics | None) -> Calibration:
    streams = [dict(of) for of in calibration.streams]
    del streams[layer][stream]
    if value is not None:
        streams[layer][stream] = value
    return dataclasses.replace(calibration, streams=tuple(streams))


def test_files_that_are_not_the_models_own(tmp_path: Path) -> None:
    base = random_model()
    sound = proposed(base, 0.99)[0]
    path = tmp_path / "given.safetensors"
    save_calibration(path, sound)
    found = read_calibration(path, base.model, digest_of(base))
    assert (found.model, found.tokens, found.proposal) == (sound.model, 320, sound.proposal)
    assert torch.equal(found.streams[1]["v"].energy, sound.streams[1]["v"].energy)
    k = sound.streams[0]["k"]
    for damaged in (
        dataclasses.replace(sound, streams=sound.streams[:1]),
        changed(sound, 1, "v", None),
        changed(sound, 0, "k", StreamStatistics(k.mean[:1], k.energy[:1])),
        changed(sound, 0, "k", StreamStatistics(k.mean.double(), k.energy.double())),
        changed(sound, 0, "k", StreamStatistics(k.mean * float("nan"), k.energy)),
        changed(sound, 0, "k", StreamStatistics(k.mean, -k.energy)),
        dataclasses.replace(sound, proposal="turbo9"),
        dataclasses.replace(sound, proposal="turbo4,7:bf16"),
        dataclasses.replace(sound, model=digest_of(random_model(shift=1.0))),
    ):
        save_calibration(path, damaged)
        with pytest.raises(ConfigError) as refusal:
            read_calibration(path, base.model, digest_of(base))
        assert "\n" not in str(refusal.value)
    with pytest.raises(ConfigError, match="the calibration of another model"):
        read_calibration(path, base.model, digest_of(base))
    for content in (b"", b"nonsense", random.Random(1).randbytes(200)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="damaged"):
            read_calibration(path, base.model, digest_of(base))
