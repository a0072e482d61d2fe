"""Models with packed weights: packed once, then read from the cache folder.

A file there belongs to one checkpoint as it was when it was read, by the sizes and times of its files. What does not
fit is made anew. The files that were not used for longest go when all of them together are large."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from kvist.base.errors import ConfigError, KvistError
from kvist.base.files import cache_folder
from kvist.base.units import format_bytes
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.linear import Grouping, tensors_of, uniform
from kvist.models.load import Operators, Source, build_packed, describe, describe_packed, load_packed
from kvist.service.budget import free_memory
from kvist.weights.checkpoint import Stamp, save

BITS = {"int8": 8, "int4": 4}  # of a weight, by what people call it
_VERSION = 1  # raised whenever the same weights would be packed into other bytes
_MOST_BYTES = 64 << 30  # of all files
_MOST_HEADER = 16 << 20  # bytes
_KINDS = {torch.uint8: "U8", torch.float32: "F32"}


def open_packed(
    checkpoint: Source,
    config: ModelConfig,
    operators: Operators,
    how: str,
    grouping: Grouping,
    stamp: Stamp,
    tell: Callable[[], None],
) -> Decoder:
    """The decoder of a checkpoint with its matrices packed by `grouping`, which people call `how`. `stamp`: of the
    weight files. `tell` is called where they have to be packed first. Raises `WeightsError`."""
    path = packed_path(checkpoint.directory, config, how, stamp)
    model = build_packed(config, operators, grouping)
    if _read(path, model):
        return model
    tell()
    model = load_packed(checkpoint, config, operators, grouping)
    try:
        save(path, tensors_of(model), {"weights": how, "lost": f"{model.packing_loss:.3e}"})
        _make_room(path)
    except KvistError:
        pass  # it is only slower next time
    return model


def packed_path(source: Path, config: ModelConfig, how: str, stamp: Stamp) -> Path:
    """Where the packed weights of a checkpoint lie."""
    facts = [_VERSION, str(source.resolve()), repr(config), how, stamp]
    return cache_folder() / "packed" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path, model: Decoder) -> bool:
    """Fill the model from a file; whether that was possible. Otherwise its tensors hold anything.

    Straight into its memory: through the library's mapping every page would be faulted in on its own, which takes five
    times as long."""
    wanted = tensors_of(model)
    try:
        with path.open("rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MOST_HEADER:
                return False
            header = json.loads(file.read(size))
            loss = float(header.pop("__metadata__")["lost"])
            if header.keys() != wanted.keys():
                return False
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                tensor, (start, end) = wanted[name], entry["data_offsets"]
                if list(tensor.shape) != entry["shape"] or _KINDS[tensor.dtype] != entry["dtype"]:
                    return False
                if end - start != tensor.nbytes or file.seek(8 + size + start) != 8 + size + start:
                    return False
                if file.readinto(tensor.detach().view(torch.uint8).numpy()) != tensor.nbytes:
                    return False
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    model.packing_loss = loss
    return True


def _make_room(kept: Path) -> None:
    """Remove the files that were not used for longest, none of them `kept`."""
    files = [(path.stat().st_mtime, path.stat().st_size, path) for path in kept.parent.glob("*.safetensors")]
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= _MOST_BYTES:
            return
        if path != kept:
            path.unlink(missing_ok=True)
            total -= size


def check_memory(config: ModelConfig, operators: Operators, how: torch.dtype | Grouping) -> None:
    """Raises `ConfigError` where the weights in that form take more memory than there is, and says what would fit."""
    needed, free = weight_bytes(config, operators, how), free_memory()
    if needed <= free:
        return
    sizes = {name: weight_bytes(config, operators, uniform(bits)) for name, bits in BITS.items()}
    fitting = [f"--weights {name} takes {format_bytes(size)}" for name, size in sizes.items() if size <= free]
    raise ConfigError(
        f"the weights take {format_bytes(needed)} and {format_bytes(free)} of memory are free; "
        + (", ".join(fitting) if fitting else f"even as int4 they take {format_bytes(sizes['int4'])}")
    )


def weight_bytes(config: ModelConfig, operators: Operators, how: torch.dtype | Grouping) -> int:
    """Bytes of a decoder's weights, in a type of numbers or packed. Nothing is allocated."""
    if isinstance(how, torch.dtype):
        return sum(tensor.numel() for tensor in tensors_of(describe(config, operators)).values()) * how.itemsize
    return sum(tensor.nbytes for tensor in tensors_of(describe_packed(config, operators, how)).values())
