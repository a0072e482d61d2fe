"""What made KV: the same for the same, another for whatever changes a byte of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvist.base.errors import KvistError, WeightsError
from kvist.service import identity as module
from kvist.service.identity import Identity, identify, weights_digest
from kvist.service.keeping import DISK, KeepSettings, open_kept
from kvist.service.loaded import Loaded, open_model
from kvist.weights.checkpoint import stamp_of
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("identity") / "tiny")


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The digests that are remembered, without the compiled operators' folder being another."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "cache_folder", lambda: folder)
    return folder


def change_a_weight(model: Path) -> None:
    """One bit of one weight, with size and time of modification as they were."""
    path = model / "model.safetensors"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def opened(model: Path, **more: str) -> Loaded:
    return open_model(str(model), **more)


def test_the_same_model_is_the_same(model: Path) -> None:
    assert identify(opened(model)) == identify(opened(model))
    assert len(identify(opened(model)).digest) == 32


def test_a_changed_bit_of_the_weights_is_another_identity(model: Path) -> None:
    before = identify(opened(model))
    os.utime(model / "model.safetensors", (1, 1))
    same = identify(opened(model))
    assert same == before
    change_a_weight(model)
    after = identify(opened(model))
    assert "weights" in before.differences(after)
    assert after.digest != before.digest


def test_the_digest_is_remembered_while_the_files_stay_as_they_are(
    model: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(decoder: object) -> str:
        calls.append(1)
        return weights_digest(decoder)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "weights_digest", counted)
    first = identify(opened(model))
    assert not list(own_cache.rglob("*.json"))  # the files have just been written: they may be again
    monkeypatch.setattr(module, "_SETTLED", -1.0)
    identify(opened(model))
    assert identify(opened(model)) == first
    assert len(calls) == 2
    change_a_weight(model)
    assert identify(opened(model)).weights != first.weights
    assert len(calls) == 3
    # What is remembered and damaged is worked out again.
    for path in own_cache.rglob("*.json"):
        path.write_text("{")
    shutil.copy(model / "model.safetensors", model / "again")
    os.replace(model / "again", model / "model.safetensors")
    identify(opened(model))
    assert len(calls) == 4


def test_weights_that_change_while_they_are_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter([stamp_of(model), ()])
    monkeypatch.setattr("kvist.service.loaded.stamp_of", lambda directory: next(stamps))
    with pytest.raises(WeightsError, match="were changed while they were read"):
        opened(model)


@pytest.mark.parametrize(
    ("change", "differs"),
    [("codec", {"kv", "layout", "arithmetic"}), ("tokenizer", {"tokenizer"}), ("rope", {"config", "arithmetic"})],
)
def test_whatever_else_changes_is_another_identity(change: str, differs: set[str], model: Path) -> None:
    before = identify(opened(model))
    if change == "codec":
        after = identify(opened(model, kv="bf16"))
    elif change == "tokenizer":
        path = model / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": None}) + "\n")
        after = identify(opened(model))
    else:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 10_001.0}))
        after = identify(opened(model))
    assert set(before.differences(after)) == differs


def test_operators_that_round_otherwise_are_another_identity(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(opened(model))
    monkeypatch.setenv("KVIST_OPS", "reference")
    after = identify(opened(model))
    assert {"operators"} <= set(before.differences(after)) <= {"operators", "arithmetic"}


def test_descriptions_are_read_strictly(model: Path) -> None:
    good = identify(opened(model))
    assert Identity.of_json(json.loads(json.dumps(good.to_json()))) == good
    for bad in (None, [], {}, good.to_json() | {"more": "x"}, good.to_json() | {"weights": 3}, {"model": "x"}):
        with pytest.raises(KvistError, match="it describes no model"):
            Identity.of_json(bad)
    assert good.digest == replace(good, model="renamed").digest


def test_another_model_of_that_name_is_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = KeepSettings(tmp_path / "kv")
    with open_kept(opened(model), settings) as kept:
        assert kept.cache.rivals == ()
        first = kept.identity.digest
    change_a_weight(model)
    with caplog.at_level("INFO", "kvist.cache"), open_kept(opened(model), settings) as kept:
        assert list(kept.cache.rivals) == [first]
    assert "is not used: its weights, arithmetic differ" in caplog.text or "its weights differ" in caplog.text
    (tmp_path / "kv" / "identities" / "bad.json").write_text("{}")
    with open_kept(opened(model), settings):
        pass


def test_the_budget_of_a_folder_is_remembered(tmp_path: Path) -> None:
    assert KeepSettings(tmp_path).budget() == DISK
    assert KeepSettings(tmp_path, 5000).budget() == 5000
    assert KeepSettings(tmp_path).budget() == 5000
    (tmp_path / "budget.json").write_text('{"disk": "much"}')
    assert KeepSettings(tmp_path).budget() == DISK
