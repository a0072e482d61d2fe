"""What was measured once on a model's own keys and values, and is frozen from then on.

The mean of each head's keys is subtracted from every key and never added back: all scores of a softmax lose the same
q.mean, so the weights do not change, and the codes need not spend their range on what all keys have in common. The
energy of each channel says which channels deserve more bits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.base.files import atomic_file

FORMAT = "kvist-calibration-2"
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class StreamStatistics:
    """`mean` [H, D] float32; `energy` [H, D] float32, the variance of each channel about it."""

    mean: Tensor
    energy: Tensor

    def order(self) -> Tensor:
        """Channels by energy, the largest first: [H, D] int32. Equal ones in their own order."""
        return self.energy.sort(dim=-1, descending=True, stable=True).indices.int()


@dataclass(frozen=True)
class Calibration:
    """`model`: digest of the model it was measured on, of all its weights; `tokens`: on how many; `streams`: layer by
    layer, by name.

    `proposal`: the assignment that `--kv auto` stands for, when it has been worked out; `plugins`: who made the codecs
    in it that are not ours, by name.
    """

    model: str
    tokens: int
    streams: tuple[Mapping[str, StreamStatistics], ...]
    proposal: str | None = None
    plugins: Mapping[str, str] = field(default_factory=dict)


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Whole or not at all."""
    tensors = {}
    for index, streams in enumerate(calibration.streams):
        for name, statistics in streams.items():
            tensors[f"{index}.{name}.mean"] = statistics.mean.contiguous()
            tensors[f"{index}.{name}.energy"] = statistics.energy.contiguous()
    metadata = {
        "format": FORMAT,
        "model": calibration.model,
        "tokens": str(calibration.tokens),
        "layers": str(len(calibration.streams)),
        "proposal": calibration.proposal or "",
        "plugins": json.dumps(dict(calibration.plugins)),
    }
    with atomic_file(path) as target:
        save_file(tensors, target, metadata)


def load_calibration(path: Path, model: str) -> Calibration:
    """The calibration in `path`. Raises `ConfigError` when it is none, is damaged, or was measured on other weights
    than those of digest `model`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is too large for a calibration; run kvist calibrate again")
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged ({error}); run kvist calibrate again") from None
    if facts.get("format") != FORMAT:
        raise ConfigError(f"{path} is no calibration of this version; run kvist calibrate again")
    if facts.get("model") != model:
        raise ConfigError(f"{path} is the calibration of another model; run kvist calibrate on this one")
    try:
        streams: list[dict[str, StreamStatistics]] = [{} for _ in range(int(facts["layers"]))]
        for name, mean in tensors.items():
            index, stream, kind = name.split(".")
            if kind == "mean":
                streams[int(index)][stream] = StreamStatistics(mean, tensors[f"{index}.{stream}.energy"])
        plugins = {str(name): str(origin) for name, origin in json.loads(facts.get("plugins", "{}")).items()}
        return Calibration(model, int(facts["tokens"]), tuple(streams), facts.get("proposal") or None, plugins)
    except (KeyError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); run kvist calibrate again") from None


def statistics(x: Tensor) -> StreamStatistics:
    """Of x [T, H, D]: computed in float64, kept in float32."""
    wide = x.to(torch.float64)
    return StreamStatistics(wide.mean(0).float(), wide.var(0, correction=0).float())
