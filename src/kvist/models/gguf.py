"""A GGUF file in the terms of Hugging Face: a `config.json` from its metadata, and its tensors' names."""

from typing import Any

import numpy as np

from kvist.base.errors import ConfigError, WeightsError
from kvist.models.config import ModelConfig
from kvist.models.gguf_facts import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, Architecture, Facts
from kvist.models.gguf_families import ARCHITECTURES
from kvist.weights.gguf import Joined, Part
from kvist.weights.gguf_header import GgufHeader, GgufTensor


def config_of(header: GgufHeader) -> dict[str, Any]:
    """What would stand in the model's `config.json`. Raises `ConfigError` for an architecture that is not known,
    `WeightsError` for keys that are missing."""
    architecture = _architecture(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{header.path}: there is no tensor 'token_embd.weight' of two dimensions")
    tied, facts = "output.weight" not in header.tensors, Facts(header)
    config = architecture.config(facts)
    facts.finish()
    return config | {"vocab_size": embedding.shape[0], "tie_word_embeddings": tied}


def parts_of(header: GgufHeader, config: ModelConfig) -> dict[str, Part | Joined]:
    """The file's tensors under the names of Hugging Face. Raises `WeightsError` for one that has no place there."""
    architecture, parts = _architecture(header), dict[str, Part | Joined]()
    for name, tensor in header.tensors.items():
        if name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue
        stem, _, ending = name.rpartition(".")
        first, _, rest = stem.partition(".")
        number, _, inner = rest.partition(".")
        within = first == "blk" and number.isdecimal()
        block = architecture.prefix.format(int(number)) if within else ""
        if within and f"{inner}.{ending}" in architecture.named:
            parts[block + architecture.named[f"{inner}.{ending}"]] = Part(tensor)
            continue
        if within and architecture.split is not None and inner in architecture.split[:2]:
            parts[f"{block}{architecture.split[2]}.{ending}"] = _joined(header, f"blk.{number}.", architecture, config)
            continue
        if within and inner in architecture.experts and len(tensor.shape) == 3:
            for expert in range(tensor.shape[0]):
                where = architecture.experts[inner].format(expert)
                parts[f"{block}{where}.{ending}"] = Part(tensor, matrix=expert)
            continue
        if stem in architecture.outer:
            theirs, where = stem, architecture.outer[stem]
        elif within and inner in architecture.block:
            theirs, where = inner, block + architecture.block[inner]
        else:
            raise WeightsError(
                f"{header.path}: tensor {name!r:.80} has no place in the architecture {header.architecture!r}"
            )
        parts[f"{where}.{ending}"] = _part(architecture, name, theirs, tensor, config)
    return parts


def _joined(header: GgufHeader, block: str, architecture: Architecture, config: ModelConfig) -> Joined:
    """Of one head after another the rows of its keys, which lie there as columns, and those of its values."""
    assert architecture.split is not None
    keys, values = (header.tensors.get(f"{block}{name}.weight") for name in architecture.split[:2])
    shape = config.heads, config.head_dim, getattr(config, "plain", 0)
    if (
        keys is None
        or values is None
        or keys.shape != shape
        or len(values.shape) != 3
        or values.shape[::2] != shape[:2]
    ):
        raise WeightsError(
            f"{header.path}: {block}{architecture.split[0]} and {architecture.split[1]} should be matrices of "
            f"{config.heads} heads and {config.head_dim} latent numbers"
        )
    found = list[Part]()
    for head in range(keys.shape[0]):
        found += [Part(keys, transposed=True, matrix=head), Part(values, matrix=head)]
    return Joined(tuple(found))


def _part(architecture: Architecture, name: str, theirs: str, tensor: GgufTensor, config: ModelConfig) -> Part:
    added = next((number for end, number in architecture.added.items() if name.endswith(end)), 0.0)
    order, matrix = architecture.order(theirs, config), len(tensor.shape) == 2
    if order is not None and len(order) != (tensor.shape[0] if matrix else tensor.shape[-1]):
        order = None  # the shape is refused where it is compared
    return Part(tensor, order, matrix and theirs in architecture.turned, -added)


def file_name(architecture: str, name: str, config: ModelConfig) -> tuple[str, np.ndarray | None]:
    """The other way: what a tensor of Hugging Face is called in files of an architecture, and in which order its rows
    lie there; None: in their own."""
    known, (stem, _, ending) = ARCHITECTURES[architecture], name.rpartition(".")
    if found := next((theirs for theirs, ours in known.outer.items() if ours == stem), None):
        return f"{found}.{ending}", None
    number, _, inner = stem.removeprefix(known.prefix.partition("{")[0]).partition(".")
    theirs = next(theirs for theirs, ours in known.block.items() if ours == inner)
    return f"blk.{number}.{theirs}.{ending}", known.order(theirs, config)


def _architecture(header: GgufHeader) -> Architecture:
    found = ARCHITECTURES.get(header.architecture)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{header.path}: architecture {header.architecture!r:.80} is not supported ({known} are)")
    return found
