"""What made KV: the same for the same, another for whatever changes a byte of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvist.base.errors import KvistError, WeightsError
from kvist.models.decoder import Decoder
from kvist.service import digest as module
from kvist.service.digest import model_digest, weights_digest
from kvist.service.identity import Identity, identify
from kvist.service.keeping import DISK, KeepSettings, open_kept
from kvist.service.loaded import Loaded, open_model
from kvist.weights import checkpoint
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
    monkeypatch.setattr(module, "writable_cache_folder", lambda: folder)
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


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever all weights are read for their digest."""
    calls: list[int] = []

    def digest(decoder: Decoder) -> str:
        calls.append(1)
        return weights_digest(decoder)

    monkeypatch.setattr(module, "weights_digest", digest)
    return calls


def test_the_digest_is_remembered_while_the_files_stay_as_they_are(
    model: Path, own_cache: Path, counted: list[int]
) -> None:
    first = identify(opened(model))
    assert identify(opened(model)) == first
    assert len(counted) == 1
    change_a_weight(model)  # and its size and time of modification stay
    assert identify(opened(model)).weights != first.weights
    assert len(counted) == 2
    # What is remembered and damaged is worked out again.
    for path in own_cache.rglob("*.json"):
        path.write_text("{")
    identify(opened(model))
    assert len(counted) == 3
    # As is that of another file with all the same times but one.
    shutil.copy2(model / "model.safetensors", model / "again")
    os.replace(model / "again", model / "model.safetensors")
    identify(opened(model))
    assert len(counted) == 4


def test_each_form_in_which_files_are_read_has_a_digest_of_its_own(model: Path, counted: list[int]) -> None:
    forms: list[dict[str, str]] = [{}, {"dtype": "bf16"}, {"weights": "int8"}, {"weights": "int4"}]
    forms.append({"weights": "int8", "activations": "bf16"})
    found = [opened(model, **form).weights_digest() for form in forms]
    assert len(set(found)) >= 4  # matrices that are packed alike are the same, whatever multiplies them
    assert [opened(model, **form).weights_digest() for form in forms] == found
    assert [weights_digest(opened(model, **form).model) for form in forms] == found
    assert len(counted) <= len(forms)


@pytest.mark.parametrize(
    ("age", "lasts"), [(30_000_000, True), (5_000_000, False), (-1_000_000, False), (-(10**10), False)]
)
def test_a_stamp_within_the_tick_of_its_clock_is_not_trusted(
    age: int, lasts: bool, model: Path, own_cache: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`age`, ns: how long ago the file was changed, by a clock that stands still however long one waits."""
    changed = max(at for *_, at, _ in stamp_of(model))
    monkeypatch.setattr("kvist.weights.checkpoint.time", Clock(changed + age))
    for _ in range(2):
        loaded = opened(model, weights="int8")
        assert bool(loaded.stamp) is lasts
        loaded.weights_digest()
    assert len(counted) == (1 if lasts else 2)
    assert bool(list(own_cache.rglob("*.json"))) is lasts


@pytest.mark.parametrize("whole_seconds", [False, True])
def test_the_tick_is_waited_for(whole_seconds: bool, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 10**18 + (0 if whole_seconds else 123_456_789)
    monkeypatch.setattr(checkpoint, "stamp_of", lambda source: (("model.safetensors", 1, at, at, 1),))
    clock = Clock(at + 1_000_000, goes=True)
    monkeypatch.setattr(checkpoint, "time", clock)
    _, lasts = checkpoint.settled_stamp(model)
    assert lasts
    waited = clock.now - at
    assert waited == (2_000_000_000 if whole_seconds else 20_000_000)


class Clock:
    """In the place of `time`: ns of the epoch, which pass while somebody sleeps, or not even then."""

    def __init__(self, now: int, goes: bool = False) -> None:
        self.now = now
        self.goes = goes

    def time_ns(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9) if self.goes else 0


def test_weights_that_change_while_they_are_read_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.service.loaded.stamp_of", lambda directory: ())
    with pytest.raises(WeightsError, match="were changed while they were read"):
        opened(model)


def test_two_models_that_differ_in_one_number_share_nothing(model: Path, tmp_path: Path, own_cache: Path) -> None:
    """Wherever that number is: in no digest is a part of the weights all there is."""
    plain = opened(model)
    names = list(plain.model.state_dict())
    digests, calibrations = {plain.weights_digest()}, {model_digest(plain.model, plain.weights_digest())}
    for name in (names[0], names[len(names) // 2], names[-1]):
        for place in (1, -2):
            other = opened(model).model
            with torch.no_grad():
                flat = other.state_dict()[name].view(-1)
                flat[place] += 0.5
            digests.add(weights_digest(other))
            calibrations.add(model_digest(other, weights_digest(other)))
    assert len(digests) == len(calibrations) == 7


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
