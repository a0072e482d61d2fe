"""The state of an interrupted run: whole, or refused in one line that says why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import SMALL

from kvist.train.settings import TrainError
from kvist.train.state import State, load_state, save_state, state_path

STATE = State(
    losses=[4.25, 1 / 3],
    validations=[(1, 0.1), (2, 2 / 3)],
    seconds=1.5,
    tensors={"weights.a": torch.arange(600.0).view(20, 30), "moments.0.0.step": torch.tensor(2.0)},
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_state(tmp_path, STATE, SMALL, "digest")
    return tmp_path


def test_a_state_comes_back_to_the_bit(saved: Path) -> None:
    state = load_state(saved, SMALL, "digest")
    assert (state.losses, state.validations, state.seconds) == (
        STATE.losses,
        STATE.validations,
        STATE.seconds,
    )
    assert state.tensors.keys() == STATE.tensors.keys()
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in STATE.tensors.items())


def test_saving_again_leaves_what_was_loaded(saved: Path) -> None:
    state = load_state(saved, SMALL, "digest")
    save_state(saved, replace(STATE, tensors={"weights.a": torch.zeros(20, 30)}), SMALL, "digest")
    assert torch.equal(state.tensors["weights.a"], STATE.tensors["weights.a"])


def _truncated(raw: bytes) -> bytes:
    return raw[:-100]


def _flipped(raw: bytes) -> bytes:
    return raw[:-200] + bytes([raw[-200] ^ 1]) + raw[-199:]


def _garbage(raw: bytes) -> bytes:
    return b"\x00" * len(raw)


def _empty(raw: bytes) -> bytes:
    return b""


def _renamed(raw: bytes) -> bytes:
    return raw.replace(b"kvist_training", b"other_training")


@pytest.mark.parametrize("damage", [_truncated, _flipped, _garbage, _empty, _renamed])
def test_a_damaged_state_is_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    path = state_path(saved)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TrainError, match="damaged and cannot be resumed") as refusal:
        load_state(saved, SMALL, "digest")
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_run_is_refused_and_the_difference_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="another corpus"):
        load_state(saved, SMALL, "other")
    with pytest.raises(TrainError, match=r"steps 12 there, 13 here; seed 1337 there, 5 here$"):
        load_state(saved, replace(SMALL, steps=13, seed=5), "digest")
    with pytest.raises(TrainError, match="nothing to resume"):
        load_state(tmp_path / "elsewhere", SMALL, "digest")
