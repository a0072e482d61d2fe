"""What an interrupted run needs to go on, in one safetensors file: no pickle, and no random state.

Rows and dropout are functions of seed and step, so weights, moments, the best weights and the history are all
there is. The file's metadata holds the rest as JSON, with a digest of the tensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvist.train.settings import TrainError, TrainSettings
from kvist.weights.checkpoint import save

FOLDER = ".training"
FILE = "state.safetensors"
_KEY = "kvist_training"
_VERSION = 1


@dataclass(frozen=True)
class State:
    """A run after `len(losses)` steps. `validations`: (steps done, loss). `seconds`: spent so far.

    `losses` holds the training loss of every step, in nats per token; `tensors` all tensors, by name.
    """

    losses: list[float]
    validations: list[tuple[int, float]]
    seconds: float
    tensors: dict[str, Tensor]


def state_path(directory: Path) -> Path:
    """Where the run that writes `directory` keeps its state while it lasts."""
    return directory / FOLDER / FILE


def save_state(directory: Path, state: State, settings: TrainSettings, corpus_digest: str) -> None:
    """Replace the state in `directory`. Raises `WeightsError` when it cannot be written; it then stays."""
    tensors = state.tensors | {"losses": torch.tensor(state.losses, dtype=torch.float64)}
    facts = {
        "version": _VERSION,
        "corpus": corpus_digest,
        "settings": asdict(settings),
        "validations": state.validations,
        "seconds": state.seconds,
        "tensors": _digest(tensors),
    }
    save(state_path(directory), tensors, {_KEY: json.dumps(facts)})


def load_state(directory: Path, settings: TrainSettings, corpus_digest: str) -> State:
    """The state in `directory`.

    Raises `TrainError` when there is none, when it is damaged, or when it belongs to another corpus or other
    settings, naming what differs.
    """
    path = state_path(directory)
    if not path.is_file():
        raise TrainError(f"there is nothing to resume: {path} does not exist; leave --resume out to begin")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(_KEY, "null"))
            # Cloned, because what the library returns lies in the mapped file, which the next save replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())) from None
    except OSError as error:
        raise TrainError(f"cannot read {path}: {error.strerror or error}") from None
    if not isinstance(facts, dict) or facts.get("version") != _VERSION:
        raise _damaged(path, "it is not a training state of this version")
    _require_same(path, facts, settings, corpus_digest)
    if facts.get("tensors") != _digest(tensors):
        raise _damaged(path, "its tensors do not have the digest that it states")
    losses = tensors.pop("losses").tolist()
    return State(losses, [(int(step), float(loss)) for step, loss in facts["validations"]], facts["seconds"], tensors)


def _require_same(path: Path, facts: Mapping[str, Any], settings: TrainSettings, corpus_digest: str) -> None:
    if facts.get("corpus") != corpus_digest:
        raise TrainError(f"{path} belongs to a run on another corpus; resume with that one, or choose another output")
    before, now = facts.get("settings", {}), asdict(settings)
    differing = [f"{name} {before.get(name)} there, {now[name]} here" for name in now if before.get(name) != now[name]]
    if differing:
        raise TrainError(f"{path} belongs to a run with other settings: {'; '.join(differing)}")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> TrainError:
    return TrainError(f"{path} is damaged and cannot be resumed ({why}); delete {path.parent.parent} and begin again")
