"""From a checkpoint directory to a decoder in memory, one tensor at a time; and back to Hugging Face's names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvist.base.errors import WeightsError
from kvist.base.files import read_json
from kvist.models.config import ModelConfig, read_config
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.gpt2 import GPT2
from kvist.models.llama import Llama
from kvist.weights.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Tensors that checkpoints carry and no decoder needs: masks and frequencies that are computed, not learned.
_DERIVED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def load_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint directory. Raises `ConfigError` or `KvistError` naming the file."""
    path = directory / "config.json"
    return read_config(read_json(path), str(path))


def build(config: ModelConfig, activations: Activations, dtype: torch.dtype) -> Decoder:
    """A decoder whose parameters are allocated and not yet filled."""
    kind = GPT2 if config.family == "gpt2" else Llama
    with torch.device("meta"):
        model = kind(config, activations).to(dtype)
    model.to_empty(device="cpu")
    return model.requires_grad_(False).eval()


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most numbers of a checkpoint have."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.names():
        dtype = checkpoint.dtype(name)
        sizes[dtype] = sizes.get(dtype, 0) + torch.Size(checkpoint.shape(name)).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def load(directory: Path, config: ModelConfig, activations: Activations, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of `directory` in `dtype` (default: as stored). Peak memory is the weights and two read windows.

    Raises `WeightsError` for a tensor that is missing, left over, of another shape, or that cannot be read.
    """
    checkpoint = Checkpoint(directory)
    model = build(config, activations, dtype or stored_dtype(checkpoint))
    slots = {_stored_name(checkpoint, slot): slot for slot in model.slots()}
    _check_names(checkpoint, slots, config)
    parameters = dict(model.named_parameters())
    targets = {}
    unfilled = {name: parameter.shape[0] for name, parameter in parameters.items()}
    for name, slot in slots.items():
        rows = slot.shape[1] if slot.transposed else slot.shape[0]
        target = parameters[slot.parameter][slot.start : slot.start + rows]
        targets[name] = target.T if slot.transposed else target
        unfilled[slot.parameter] -= rows
    assert not any(unfilled.values()), f"parameters that no tensor fills: {unfilled}"
    checkpoint.copy_into(targets)
    return model


def export(model: Decoder) -> dict[str, Tensor]:
    """The parameters under their Hugging Face names and shapes, contiguous: what `weights.save` writes."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for slot in model.slots():
        rows = slot.shape[1] if slot.transposed else slot.shape[0]
        tensor = parameters[slot.parameter].detach()[slot.start : slot.start + rows]
        tensors[slot.name] = (tensor.T if slot.transposed else tensor).contiguous()
    return tensors


def randomize(model: Decoder, seed: int, std: float = 0.02) -> Decoder:
    """Fill a built decoder with normal weights from `seed`; norm weights are 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model


def _stored_name(checkpoint: Checkpoint, slot: Slot) -> str:
    """GPT-2's first checkpoints leave the `transformer.` prefix out."""
    bare = slot.name.removeprefix("transformer.")
    return bare if bare in checkpoint.names() else slot.name


def _check_names(checkpoint: Checkpoint, wanted: Mapping[str, Slot], config: ModelConfig) -> None:
    names = checkpoint.names()
    missing = sorted(set(wanted) - names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{checkpoint.directory}: tensor {missing[0]!r}{more} is missing from the weight files")
    ignored = {"lm_head.weight"} if config.tied else set()
    extra = sorted(name for name in names - set(wanted) - ignored if not name.endswith(_DERIVED))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise WeightsError(
            f"{checkpoint.directory}: the weight files hold {extra[0]!r}{more}, which a {config.family} "
            "model of this config.json has no place for"
        )
