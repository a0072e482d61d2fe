"""A model over a cache of chosen codecs: what it takes, how it is calibrated, what is refused."""

from pathlib import Path

import pytest
import torch

from kvist.base.errors import ConfigError
from kvist.cache.codecs import BF16
from kvist.cache.layout import plan_layout
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.service import calibration as calibration_module
from kvist.service.calibration import calibration_path
from kvist.service.digest import model_digest, weights_digest
from kvist.service.loaded import Loaded, open_model, select_backend

SMALL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    layers=16,
    heads=3,
    kv_heads=1,
    head_dim=64,
    max_positions=16384,
    norm_eps=1e-5,
    activation=Activation.SILU,
    rope=Rope(10_000.0),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "writable_cache_folder", lambda: tmp_path)


def made() -> Loaded:
    backend = select_backend(SMALL, torch.bfloat16)
    model = randomize(build(SMALL, backend, torch.bfloat16), seed=0, std=0.2)
    layout = plan_layout(SMALL.layer_specs(), BF16, full=BF16)
    return Loaded("small", SMALL, model, layout, backend, Path("none"))


def path_of(loaded: Loaded) -> Path:
    return calibration_path(model_digest(loaded.model, loaded.weights_digest()))


def test_turbo4_takes_at_most_29_percent_of_bf16_at_8k_tokens() -> None:
    """All that the engine allocates for keys and values, open and passing blocks included, read from the tensors."""
    loaded = made()
    others = [loaded.with_kv(kv) for kv in ("turbo4", "bf16")]
    coded, full = (other.engine(other.room(8192)).runner.store.nbytes for other in others)
    assert full == 8192 * 16 * 2 * 64 * 2
    assert coded / full <= 0.29


def test_a_model_is_calibrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = made()
    first = loaded.with_kv("turbo4")
    assert path_of(loaded).is_file()

    def never(*arguments: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(calibration_module, "measure", never)
    second = loaded.with_kv("turbo4")
    assert second.layout.fingerprint == first.layout.fingerprint
    assert loaded.with_kv("int8").layout.fingerprint != first.layout.fingerprint
    keys, values = first.layout.layers[3].streams
    assert keys.frame.mean.any()
    assert not values.frame.mean.any()


def test_other_weights_have_another_digest() -> None:
    loaded = made()
    before = weights_digest(loaded.model)
    assert weights_digest(loaded.model) == before
    with torch.no_grad():
        dict(loaded.model.named_parameters())["norm.weight"][5] += 0.5
    assert weights_digest(loaded.model) != before


def test_the_calibration_of_another_model_in_its_place_is_refused() -> None:
    loaded, other = made(), made()
    loaded.with_kv("turbo4")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    path_of(loaded).rename(path_of(other))
    with pytest.raises(ConfigError, match="is the calibration of another model; run kvist calibrate on this one"):
        other.with_kv("turbo4")


def test_auto_wants_a_proposal() -> None:
    with pytest.raises(ConfigError, match="run kvist calibrate on this model first"):
        made().with_kv("auto")


@pytest.mark.parametrize("kv", ["turbo9", "turbo4,7:bf16", "turbo4,x=bf16", "k=turbo4"])
def test_a_choice_that_cannot_be_is_refused_before_weights_are_read(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvist.service import loaded as module

    monkeypatch.setattr(module, "fill", lambda *arguments: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError):
        open_model(None, kv=kv)


def test_a_model_that_differs_in_one_number_is_measured_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "TOKENS", 128)
    loaded, other = made(), made()
    first = loaded.with_kv("turbo4").layout
    with torch.no_grad():
        other.model.embed.weight[1, 3] += 30
    second = other.with_kv("turbo4").layout
    assert path_of(loaded).is_file()
    assert path_of(other).is_file()
    assert path_of(loaded) != path_of(other)
    assert first.fingerprint != second.fingerprint
