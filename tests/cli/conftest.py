"""A checkpoint directory to damage, and the command line in this process."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command import CONFIG, Kvist, Outcome

from kvist.cli import main
from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.text.training import save_tokenizer, train_characters
from kvist.weights.checkpoint import save


@pytest.fixture(scope="session")
def pristine_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    model = build(read_config(CONFIG, "config.json"), PlainActivations(), torch.float32)
    save(directory / "model.safetensors", export(randomize(model, seed=1, std=0.3)))
    save_tokenizer(train_characters("abcdefghijklmnopqrstuvwxyz "), directory)
    return directory


@pytest.fixture
def model(pristine_model: Path, tmp_path: Path) -> Path:
    """A small random model over the letters a to z and the space, context 128; the test's own copy."""
    return Path(shutil.copytree(pristine_model, tmp_path / "tiny"))


@pytest.fixture
def kvist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kvist:
    """Run a command line as the console script does."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvist", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run
