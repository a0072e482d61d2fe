"""The engines that ours is measured beside: their settings, where they are, and what they load."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvist.base.files import atomic_folder
from kvist.bench.gguf_models import random_gguf
from kvist.bench.models import random_model
from kvist.bench.peers.worker import PeerError

LLAMA_CPP, OPENVINO, TRANSFORMERS = "llama.cpp", "openvino", "transformers"


@dataclass(frozen=True)
class Setting:
    """One way to run an engine. `how`: what its worker is told beside the model."""

    engine: str
    label: str
    how: Mapping[str, Any] = field(default_factory=dict, hash=False)


def _llama_cpp(flash: bool, keys: str, values: str) -> Setting:
    kv = keys if keys == values else f"K {keys}, V {values}"
    label = f"{kv}, flash attention {'on' if flash else 'off'}"
    return Setting(LLAMA_CPP, label, {"flash": flash, "keys": keys, "values": values})


SETTINGS = {
    LLAMA_CPP: (
        _llama_cpp(False, "f16", "f16"),
        _llama_cpp(True, "f16", "f16"),
        _llama_cpp(False, "q8_0", "f16"),
        _llama_cpp(True, "q8_0", "q8_0"),
        _llama_cpp(True, "q4_0", "q4_0"),
    ),
    OPENVINO: (Setting(OPENVINO, "u8", {"kv": "u8"}), Setting(OPENVINO, "bf16 or f32", {"kv": "float"})),
    TRANSFORMERS: (Setting(TRANSFORMERS, "bf16"),),
}


def python_of(engine: str, folder: Path) -> Path:
    """The python of an engine's environment below `folder`; transformers may stand in our own. Raises `PeerError` where
    there is none."""
    if engine == TRANSFORMERS and importlib.util.find_spec("transformers") is not None:
        return Path(sys.executable)
    python = folder / engine / "bin" / "python"
    if not python.exists():
        raise PeerError(f"{engine} is not in {folder}; make bench-peers builds it")
    return python


def model_of(engine: str, shape: str, weights: str, python: Path) -> Path:
    """What an engine loads for a shape of random weights of so many bits, made first where it is missing. `python`: of
    the engine's environment. transformers has its weights in bf16, whatever the others have."""
    if engine == LLAMA_CPP:
        return random_gguf(shape, weights)
    directory = random_model(shape, "bf16").directory
    return _exported(directory, shape, weights, python) if engine == OPENVINO else directory


def _exported(directory: Path, shape: str, weights: str, python: Path) -> Path:
    """The model in OpenVINO's form, beside the checkpoint."""
    target = directory / f"{shape}-openvino-{weights}"
    if target.exists():
        return target
    form = {"bf16": "fp16"}.get(weights, weights)
    with atomic_folder(target) as folder:
        command = [python.parent / "optimum-cli", "export", "openvino", "--model", directory, "--weight-format", form]
        done = subprocess.run(
            [*map(str, command), "--task", "text-generation-with-past", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise PeerError(f"{OPENVINO} could not export {shape}: {said[-1] if said else 'it said nothing'}")
    return target
