"""Models with packed weights: packed once, then read from the cache folder.

A file there belongs to one checkpoint as it was when it was read, by the stamp of its files, as the digest of weights
is remembered. What does not fit is made anew. The files that were not used for longest go when all of them together are
large."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kvist.base.errors import ConfigError, KvistError
from kvist.base.files import writable_cache_folder
from kvist.base.units import format_bytes
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.families import describe, described
from kvist.models.linear import tensors_of, uniform
from kvist.models.load import Operators, Source, allocate, fill, slots_in
from kvist.service.budget import free_memory
from kvist.weights.checkpoint import Stamp, save

BITS = {"int8": 8, "int4": 4}  # of a weight, by what people call it
_VERSION = 1  # raised whenever the same weights would be packed into other bytes
_MOST_BYTES = 64 << 30  # of all files
_MOST_HEADER = 16 << 20  # bytes
_KINDS = {torch.uint8: "U8", torch.float32: "F32"}


def open_packed(model: Decoder, checkpoint: Source, how: str, stamp: Stamp, tell: Callable[[], None]) -> Decoder:
    """Allocate and read a decoder that is described with packed matrices, which people call `how`. `stamp`: of the
    checkpoint's files; without one nothing is kept. `tell` is called where they have to be packed first. Raises
    `WeightsError`."""
    path = packed_path(checkpoint.directory, model.config, how, stamp) if stamp else None
    if path is not None and (places := _header(path, model)) is not None:
        allocate(model, torch.float32)
        if _read(path, model, places):
            return model
        model.zero_packed()
        slots = slots_in(checkpoint, model)
    else:
        slots = slots_in(checkpoint, model)
        allocate(model, torch.float32)
    tell()
    fill(model, checkpoint, slots)
    if path is None:
        return model
    with contextlib.suppress(KvistError, OSError):  # it is only slower next time
        save(path, tensors_of(model), {"weights": how, "lost": f"{model.packing_loss:.3e}"})
        _make_room(path)
    return model


def packed_path(source: Path, config: ModelConfig, how: str, stamp: Stamp) -> Path:
    """Where the packed weights of a checkpoint lie."""
    facts = [_VERSION, str(source.resolve()), described(config), how, stamp]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return writable_cache_folder() / "packed" / f"{name}.safetensors"


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a file begin, by name, in the file's order; and what packing them lost."""

    starts: dict[str, int]
    loss: float


def _header(path: Path, model: Decoder) -> _Places | None:
    """Where a file has the tensors of a model; None unless it has all of them, whole, and nothing else."""
    wanted = tensors_of(model)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MOST_HEADER:
                return None
            header = json.loads(file.read(size))
            whole, first = file.seek(0, os.SEEK_END), 8 + size
        loss = float(header.pop("__metadata__")["lost"])
        if header.keys() != wanted.keys():
            return None
        starts = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor, (start, end) = wanted[name], entry["data_offsets"]
            if list(tensor.shape) != entry["shape"] or _KINDS[tensor.dtype] != entry["dtype"]:
                return None
            if not 0 <= start <= end <= whole - first or end - start != tensor.nbytes:
                return None
            starts[name] = first + start
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _Places(starts, loss)


def _read(path: Path, model: Decoder, places: _Places) -> bool:
    """Fill a model that is allocated from a file; whether that was possible. Otherwise its tensors hold anything.

    Straight into its memory: through the library's mapping every page would be faulted in on its own, which takes five
    times as long."""
    tensors = tensors_of(model)
    try:
        with path.open("rb", buffering=0) as file:
            for name, start in places.starts.items():
                file.seek(start)
                raw = tensors[name].detach().view(torch.uint8).numpy().reshape(-1)
                done = 0
                while done < len(raw):  # one call reads at most 2 GiB
                    count = file.readinto(raw[done:])
                    if not count:
                        return False
                    done += count
        os.utime(path)
    except OSError:
        return False
    model.packing_loss = places.loss
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


def check_memory(model: Decoder, dtype: torch.dtype, operators: Operators) -> None:
    """Raises `ConfigError` where the weights of a decoder that is described take more memory than there is, and says
    what would fit. `dtype`: of those that are not packed."""
    needed, free = weight_bytes(model, dtype), free_memory()
    if needed <= free:
        return
    sizes = {name: _packed_bytes(model.config, operators, bits) for name, bits in BITS.items()}
    fitting = [f"--weights {name} takes {format_bytes(size)}" for name, size in sizes.items() if size <= free]
    raise ConfigError(
        f"the weights take {format_bytes(needed)} and {format_bytes(free)} of memory are free; "
        + (", ".join(fitting) if fitting else f"even as int4 they take {format_bytes(sizes['int4'])}")
    )


def weight_bytes(model: Decoder, dtype: torch.dtype) -> int:
    """Bytes of a decoder's weights once they are allocated in a type of numbers; packed ones as they are."""
    return sum(
        tensor.numel() * (1 if tensor.dtype == torch.uint8 else dtype.itemsize) for tensor in tensors_of(model).values()
    )


def _packed_bytes(config: ModelConfig, operators: Operators, bits: int) -> int:
    model = describe(config, operators)
    model.pack(uniform(bits), operators)
    return weight_bytes(model, torch.float32)
