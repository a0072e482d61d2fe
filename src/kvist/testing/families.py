"""What every family of models does: its weights go where they belong, and the cache changes no bit."""

import shutil
import tempfile
from pathlib import Path

import torch

from kvist.base.errors import KvistError
from kvist.models.families import load_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.service.loaded import open_model
from kvist.testing.exactness import verify
from kvist.weights.checkpoint import save

_WEIGHTS = "model.safetensors"


def check_family(directory: Path | str, *, kv: str = "fp32", weights: str | None = None) -> None:
    """The model in `directory` is read as any checkpoint is, and passes a small `kvist verify` under `kv` and with its
    matrices packed as `weights`. Without weight files beside its `config.json`, which should then describe a model of
    less than a few million numbers, random ones are written and read back, to the bit. Seconds."""
    directory = Path(directory)
    if any(directory.glob("*.safetensors")):
        _verify(directory, directory.name, kv, weights)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / directory.name
        copy.mkdir()
        shutil.copy2(directory / "config.json", copy)
        try:
            _write_random(copy)
        except KvistError as error:
            raise AssertionError(f"{directory}: random weights cannot be written: {error}") from error
        _verify(copy, directory.name, kv, weights)


def _write_random(directory: Path) -> None:
    """Weights that come back as they were written, each parameter whole."""
    model = randomize(build(load_config(directory), PlainActivations(), torch.float32), seed=3, std=0.2)
    save(directory / _WEIGHTS, export(model))
    read = dict(open_model(str(directory), dtype="fp32").model.named_parameters())
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, read[name]):
            raise AssertionError(f"{directory.name}: {name} is not read as it was written; its slots do not cover it")


def _verify(directory: Path, name: str, kv: str, weights: str | None) -> None:
    try:
        loaded = open_model(str(directory), kv=kv, weights=weights)
    except KvistError as error:
        raise AssertionError(f"{name} cannot be opened: {error}") from error
    verify(loaded, f"{name} with --kv {kv}" + (f" --weights {weights}" if weights else ""))
