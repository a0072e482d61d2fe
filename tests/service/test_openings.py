"""A context is used in the model that made it, without naming that: but for people who say another one."""

import json
import stat
from pathlib import Path

import pytest

from kvist.service.calibration import TEXT
from kvist.service.context_making import make_context
from kvist.service.contexts import Contexts
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import Opening, open_model
from kvist.service.openings import find_opening
from tiny_model import write_tiny_model

WORDS = TEXT.read_text("utf-8")[:1500]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "my-model")


def test_how_a_model_was_opened_lies_beside_its_blocks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    loaded = open_model("./my-model", kv="bf16")
    assert loaded.name == "my-model"
    assert loaded.opening == Opening(str(model), kv="bf16")
    settings = KeepSettings(tmp_path, 1 << 28)
    with open_kept(loaded, settings) as kept:
        made = make_context(loaded, kept, "book", "text", WORDS, ())
    assert made is not None
    monkeypatch.chdir(tmp_path)
    context = Contexts(tmp_path).get("book")
    # What goes to others, and what a server shows, says nothing of where the model lies.
    assert context.identity.model == "my-model"
    assert str(model.parent).encode() not in context.to_bytes()
    opening = find_opening(tmp_path, context.identity)
    assert opening == loaded.opening
    again = opening.open()
    with open_kept(again, settings) as kept:
        assert not context.identity.differences(kept.identity)
    (path,) = (tmp_path / "openings").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_damaged_note_is_no_note(model: Path, tmp_path: Path) -> None:
    loaded = open_model(str(model))
    with open_kept(loaded, KeepSettings(tmp_path, 1 << 28)) as kept:
        identity = kept.identity
    (path,) = (tmp_path / "openings").iterdir()
    whole = json.loads(path.read_text())
    assert find_opening(tmp_path, identity) == Opening(str(model))
    for damaged in (
        "",
        "[]",
        "{}",
        json.dumps({**whole, "model": 5}),
        json.dumps({**whole, "more": "x"}),
        "x" * 70_000,
    ):
        path.write_text(damaged)
        assert find_opening(tmp_path, identity) is None
    path.unlink()
    path.symlink_to(model / "config.json")
    assert find_opening(tmp_path, identity) is None
