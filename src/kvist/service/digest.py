"""One digest of a model's weights, of all their bytes: whatever is kept of a model on disk is found again by it.

It is worked out once and remembered in the cache folder by the stamp of the files that the weights were read from, so
that the next start reads nothing for it. A stamp that a later change of the files might not show is not trusted."""

import hashlib
import json
from pathlib import Path

import torch

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file, read_json, writable_cache_folder
from kvist.models.decoder import Decoder
from kvist.models.families import described
from kvist.models.linear import tensors_of, weights_of
from kvist.weights.checkpoint import Stamp, stamp_of

_VERSION = 1  # raised whenever the same files would be read into other bytes
_CHUNK = 16 << 20  # bytes hashed at once
_MOST_BYTES = 4096  # of a file that remembers a digest


def weights_digest(model: Decoder) -> str:
    """SHA-256 (hex) of the names, types, shapes and bytes of all parameters and packed weights."""
    digest = hashlib.sha256()
    for name, tensor in tensors_of(model).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        for start in range(0, len(data), _CHUNK):
            digest.update(data[start : start + _CHUNK].data)
    return digest.hexdigest()


def known_digest(model: Decoder, files: Path | None, stamp: Stamp, adapter: str = "") -> str:
    """The same of a model that was read from `files`; remembered while they have the `stamp` that they had then.

    Without a stamp nothing is remembered. `adapter`: the id of one that was merged as they were read."""
    if files is None or not stamp:
        return weights_digest(model)
    path, key = _place(model, files, stamp, adapter)
    try:
        if path.exists() and (known := read_json(path, _MOST_BYTES)).get("key") == key:
            return str(known["digest"])
    except (KvistError, KeyError):
        pass  # damaged: worked out again
    found = weights_digest(model)
    try:
        if stamp_of(files) == stamp:
            with atomic_file(path) as target:
                target.write_text(json.dumps({"key": key, "digest": found}))
    except (KvistError, OSError):
        pass  # it is only slower next time
    return found


def model_digest(model: Decoder, weights: str) -> str:
    """SHA-256 (hex) of the config and of the `weights`' digest: what decides which keys and values a model makes."""
    return hashlib.sha256(f"{weights}\n{described(model.config)}".encode()).hexdigest()


def _place(model: Decoder, files: Path, stamp: Stamp, adapter: str) -> tuple[Path, str]:
    """Where the digest of a model is remembered, and what has to stand there: of which files, read in which form."""
    forms = [f"{name} {weight.form}" for name, weight in weights_of(model).items()]
    types = [f"{name} {tensor.dtype}" for name, tensor in tensors_of(model).items()]
    facts = [_VERSION, str(files.resolve()), stamp, adapter, described(model.config), forms, types]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return writable_cache_folder() / "weights" / f"{key[:32]}.json", key
