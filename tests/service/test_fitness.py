"""Keys with a large bias, as some Qwen models have: what holds them, and that nothing else goes unsaid."""

import logging
from pathlib import Path

import pytest
import torch

from kvist.cache.choice import parse_choice
from kvist.cache.codecs import FP32
from kvist.cache.layout import plan_layout
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.service import calibration as calibration_module
from kvist.service import fitness
from kvist.service.fitness import LEAST, correlations, warn
from kvist.service.loaded import Loaded, select_backend

BIASED = ModelConfig(
    family="qwen2",
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=64,
    max_positions=2048,
    norm_eps=1e-6,
    activation=Activation.SILU,
    rope=Rope(1e6),
    qkv_bias=True,
)
SLOW, FAST = (30, 31, 62, 63), (3, 35)  # channels that hardly turn with position, and two that do


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calibration_module, fitness):
        monkeypatch.setattr(module, "writable_cache_folder", lambda: tmp_path)


def biased(channels: tuple[int, ...]) -> Loaded:
    """Keys of layer 1 have a bias of 300 in these channels, of which queries have little."""
    backend = select_backend(BIASED, torch.float32)
    model = randomize(build(BIASED, backend, torch.float32), seed=3, std=0.1)
    qkv = model.blocks[1].attention.qkv
    for channel in channels:
        for head in range(BIASED.heads):
            qkv.weight.data[64 * head + channel] *= 0.02
            qkv.bias.data[64 * head + channel] *= 0.02
        qkv.bias.data[64 * BIASED.heads + channel] = 300.0
    return Loaded("biased", BIASED, model, plan_layout(BIASED.layer_specs(), FP32), backend, Path("none"))


def ids(count: int) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("kv", ["int8", "turbo4"])
def test_a_bias_that_keys_share_is_taken_off_at_first_use(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "TOKENS", 512)
    loaded = biased(SLOW)
    raw = plan_layout(BIASED.layer_specs(), parse_choice(kv))
    assert correlations(loaded.model, raw, ids(256))[1] < LEAST  # as it would be without
    assert correlations(loaded.model, loaded.with_kv(kv).layout, ids(256))[1] > 0.98


def test_what_cannot_be_held_is_said_with_what_can(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_module, "TOKENS", 512)
    plain, loaded = biased(()), biased(FAST)
    digest = loaded.weights_digest()

    def told(of: Loaded, kv: str) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "kvist.cache"):
            warn(of.model, of.directory, of.with_kv(kv).layout, of.weights_digest())
        return "\n".join(record.getMessage() for record in caplog.records)

    for kv in ("int8", "turbo4", "turbo2", "int4"):
        assert told(plain, kv) == "", "ordinary keys"
    said = told(loaded, "turbo3")
    assert said.startswith("turbo3 does not hold the k of layer 1: ")
    assert "\n" not in said
    assert "--kv turbo3,1:k=fp32 does" in said
    assert told(loaded, "turbo3,1:k=fp32") == ""
    # Told again, and not measured again.
    monkeypatch.setattr(fitness, "observe", lambda *arguments: pytest.fail("it was measured again"))
    assert told(loaded, "turbo3") == said
    assert correlations(loaded.model, loaded.with_kv("turbo3").layout, ids(127)) == {}, "nothing sees a coded block"
    assert loaded.weights_digest() == digest
