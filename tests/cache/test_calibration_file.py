"""Calibrations: what is measured, that a file gives back what was saved, and what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvist.base.errors import ConfigError
from kvist.cache.calibration import Calibration, StreamStatistics, load_calibration, save_calibration, statistics
from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.spec import key_value


def made(model: str = "a" * 64, heads: int = 2, dim: int = 32) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    streams = []
    for _ in range(3):
        x, y = (torch.randn(100, heads, dim, generator=generator) + 3 for _ in range(2))
        streams.append({"k": statistics(x), "v": statistics(y)})
    return Calibration(model, 100, tuple(streams), "turbo4,0:bf16")


def test_statistics_are_mean_and_variance() -> None:
    x = torch.randn(1000, 2, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9) + 5
    found = statistics(x)
    assert torch.allclose(found.mean.double(), x.double().mean(0), rtol=1e-6)
    assert torch.allclose(found.energy.double(), ((x.double() - x.double().mean(0)) ** 2).mean(0), rtol=1e-5)
    assert found.order()[0].tolist() == sorted(range(8), key=lambda i: -float(found.energy[0, i]))


def test_equal_channels_keep_their_order() -> None:
    assert StreamStatistics(torch.zeros(1, 5), torch.tensor([[1.0, 2, 1, 2, 1]])).order().tolist() == [[1, 3, 0, 2, 4]]


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    calibration, path = made(), tmp_path / "a" / "calibration.safetensors"
    save_calibration(path, calibration)
    loaded = load_calibration(path, calibration.model)
    assert (loaded.model, loaded.tokens, loaded.proposal) == (calibration.model, 100, "turbo4,0:bf16")
    for ours, theirs in zip(loaded.streams, calibration.streams, strict=True):
        for name in ("k", "v"):
            assert torch.equal(ours[name].mean, theirs[name].mean)
            assert torch.equal(ours[name].energy, theirs[name].energy)


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def not_a_calibration(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path)


def strange_names(path: Path) -> None:
    facts = {"format": "kvist-calibration-2", "model": "a" * 64, "layers": "1", "tokens": "1"}
    save_file({"0.k.mean": torch.zeros(1)}, path, facts)


def no_number(path: Path) -> None:
    facts = {"format": "kvist-calibration-2", "model": "a" * 64, "layers": "many", "tokens": "1"}
    save_file({"0.k.mean": torch.zeros(1)}, path, facts)


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (damaged, "is damaged"),
        (not_a_calibration, "is no calibration of this version"),
        (strange_names, "is damaged"),
        (no_number, "is damaged"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, damage, finding: str) -> None:
    path = tmp_path / "calibration.safetensors"
    save_calibration(path, made())
    damage(path)
    with pytest.raises(ConfigError) as refusal:
        load_calibration(path, "a" * 64)
    assert finding in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_calibration_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    save_calibration(path, made())
    with pytest.raises(ConfigError, match="is the calibration of another model; run kvist calibrate on this one"):
        load_calibration(path, "b" * 64)
    with pytest.raises(ConfigError, match="the calibration is of another model: layer 0"):
        plan_layout([key_value(4, 64)] * 3, codec("turbo4"), calibration=made())


def test_only_what_a_codec_asks_for_reaches_its_frames() -> None:
    calibration = made()
    for name, centred, ordered in (
        ("turbo4", True, False),
        ("turbo2.5", True, True),
        ("int4", False, False),
        ("int8", True, False),
    ):
        layout = plan_layout([key_value(2, 32)] * 3, codec(name), calibration=calibration)
        for layer, streams in zip(layout.layers, calibration.streams, strict=True):
            keys, values = (stream.frame for stream in layer.streams)
            assert torch.equal(keys.mean, streams["k"].mean) == centred
            assert not values.mean.any(), "the mean of values would be missed in the output"
            assert torch.equal(keys.order, streams["k"].order()) == ordered
            assert torch.equal(values.order, streams["v"].order()) == ordered
