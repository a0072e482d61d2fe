"""From a checkpoint directory to a decoder in memory, one tensor at a time; and back to Hugging Face's names."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvist.base.errors import WeightsError, brief
from kvist.models.config import ModelConfig
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.families import describe
from kvist.models.linear import Grouping, PackedOperators, PackedRows, weights_of
from kvist.ops.memory import CACHE_LINE, zeros
from kvist.weights.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Tensors that checkpoints carry and no decoder needs: masks and frequencies that are computed, not learned.
_DERIVED = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
_HEAD = "lm_head.weight"
_HASHED_ROWS = 4096  # at once


class Operators(Activations, PackedOperators, Protocol):
    """What decoders are run with: a backend."""


def build(config: ModelConfig, activations: Activations, dtype: torch.dtype) -> Decoder:
    """A decoder whose parameters are allocated and not yet filled."""
    return allocate(describe(config, activations), dtype)


class Source(Protocol):
    """Where the tensors of a checkpoint come from, by the names of Hugging Face; see `Checkpoint`."""

    directory: Path

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]: ...

    def copy_into(self, targets: Mapping[str, Any]) -> None: ...


def stored_dtype(checkpoint: Source) -> torch.dtype:
    """The dtype most numbers of a checkpoint have; float32 when it holds none."""
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint.names():
        if not name.endswith(_DERIVED):
            dtype = checkpoint.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(checkpoint.shape(name))
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def load(
    source: Path | Source, config: ModelConfig, activations: Activations, dtype: torch.dtype | None = None
) -> Decoder:
    """The decoder of a directory, or of another source, in `dtype` (default: as stored). Peak memory is the weights and
    one read buffer.

    Raises `WeightsError` for a tensor that is missing, left over, of another shape, or that cannot be read; nothing
    is allocated before the weight files' headers agree with `config`.
    """
    checkpoint = Checkpoint(source) if isinstance(source, Path) else source
    check_layers(checkpoint, config)
    model = describe(config, activations)
    slots = slots_in(checkpoint, model)
    return fill(allocate(model, dtype or stored_dtype(checkpoint)), checkpoint, slots)


def load_packed(source: Path | Source, config: ModelConfig, operators: Operators, grouping: Grouping) -> Decoder:
    """The same, its matrices packed as they are read. Peak memory is the packed weights, and a read buffer with what
    packing it takes. Raises `WeightsError` as `load` does."""
    checkpoint = Checkpoint(source) if isinstance(source, Path) else source
    check_layers(checkpoint, config)
    model = describe(config, operators)
    slots = slots_in(checkpoint, model)
    model.pack(grouping, operators)
    return fill(allocate(model, torch.float32), checkpoint, slots)


def check_layers(checkpoint: Source, config: ModelConfig) -> None:
    """Raises `WeightsError` for a config of more layers than there are tensors, before any of them is built."""
    if (tensors := len(checkpoint.names())) < config.layers:
        raise WeightsError(
            f"{checkpoint.directory}: config.json says {config.layers} layers, and the weight files hold "
            f"{tensors} tensors"
        )


Slots = dict[str, list[Slot]]  # where a checkpoint's tensors go, by their names there


def slots_in(checkpoint: Source, model: Decoder) -> Slots:
    """Where each tensor of a checkpoint goes. Raises `WeightsError` unless the checkpoint holds exactly the tensors of
    this model, in their shapes."""
    slots: Slots = {}
    for slot in model.slots():
        slots.setdefault(_stored_name(checkpoint, slot, model), []).append(slot)
    _check(checkpoint, slots, model)
    return slots


def fill(model: Decoder, checkpoint: Source, slots: Slots) -> Decoder:
    """Read a decoder that is allocated; `slots` as `slots_in` gives them."""
    places = _places(model)
    direct, turned, parted = {}, {}, {}
    for name, (slot, *more) in slots.items():
        place = _target(places, slot)
        if more or slot.part is not None:
            parted[name] = [slot, *more]
        else:
            (turned if slot.transposed and isinstance(place, PackedRows) else direct)[name] = place
    checkpoint.copy_into(direct)
    for name, place in turned.items():  # an output's numbers lie apart, and are packed together
        whole = torch.empty(place.shape[::-1])
        checkpoint.copy_into({name: whole})
        place.copy_(whole.T)
    for name, tensor in checkpoint.stream(parted):
        for slot in parted[name]:
            place, part = _target(places, slot), slot.of(tensor)
            place.copy_(part.T if slot.transposed and isinstance(place, PackedRows) else part)
    losses = [loss for weight in weights_of(model).values() for loss in weight.losses]
    if total := sum(whole for _, whole in losses):
        model.packing_loss = math.sqrt(sum(lost for lost, _ in losses) / total)
    if model.config.tied and _HEAD in checkpoint.names():
        _check_tied(checkpoint, next(name for name, (slot, *_) in slots.items() if slot.parameter == "embed.weight"))
    return model


def export(model: Decoder) -> dict[str, Tensor]:
    """The parameters under their Hugging Face names and shapes, contiguous: what `weights.save` writes."""
    places = _places(model)
    found: dict[str, Tensor] = {}
    for slot in model.slots():
        place = _target(places, slot)
        if isinstance(place, PackedRows):
            raise WeightsError("packed weights are not written as a checkpoint: load the model without --weights")
        if slot.part is None:
            found[slot.name] = place.contiguous()
            continue
        whole = found.setdefault(slot.name, place.new_empty(slot.whole))
        slot.of(whole).copy_(place)
    return found


def randomize(model: Decoder, seed: int, std: float = 0.02) -> Decoder:
    """Fill a built decoder with normal weights from `seed`; norm weights are 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data.fill_(1.0)
        else:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
    return model


def allocate(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Memory for all parameters, and for the packed weights, zeros, side by side in the order in which a step reads
    them."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Not `to_empty`, which takes a third of a second to import what it needs.
            room = torch.empty(parameter.shape, dtype=dtype)
            module.register_parameter(name, nn.Parameter(room, requires_grad=False))
    packed = [(weight, weight.form) for weight in weights_of(model).values() if weight.form is not None]
    sizes = [-(-form.nbytes // CACHE_LINE) * CACHE_LINE for _, form in packed]
    for (weight, form), room in zip(packed, zeros([sum(sizes)], torch.uint8).split(sizes), strict=True):
        weight.codes = room[: form.nbytes].view(form.shape)
    model.allocated()
    return model.eval()


def _places(model: Decoder) -> dict[str, Tensor | PackedRows]:
    """Where the numbers of each parameter go, by its name, packed ones under the name that they had."""
    places: dict[str, Tensor | PackedRows] = dict(model.named_parameters())
    for name, module in weights_of(model).items():
        if module.form is not None:
            places[f"{name}.weight"] = PackedRows(module, 0, (module.form.rows, module.form.columns))
    return places


def _target(places: Mapping[str, Tensor | PackedRows], slot: Slot) -> Tensor | PackedRows:
    """The rows of a parameter that hold one tensor of a checkpoint, in the checkpoint's shape unless they are
    packed."""
    place, rows = places[slot.parameter], slot.shape[1] if slot.transposed else slot.shape[0]
    if isinstance(place, PackedRows):
        return place[slot.start : slot.start + rows]
    view = place.detach()[slot.start : slot.start + rows]
    return view.T if slot.transposed else view


def _stored_name(checkpoint: Source, slot: Slot, model: Decoder) -> str:
    """What a tensor is called in this checkpoint."""
    names = checkpoint.names()
    others = (other + slot.name.removeprefix(one) for one, other in model.renamed if slot.name.startswith(one))
    return slot.name if slot.name in names else next((name for name in others if name in names), slot.name)


def _check(checkpoint: Source, wanted: Slots, model: Decoder) -> None:
    """Raises `WeightsError` unless the files hold exactly the tensors that are wanted, in their shapes."""
    names = checkpoint.names()
    missing = sorted(set(wanted) - names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise WeightsError(f"{checkpoint.directory}: tensor {brief(missing[0])}{more} is missing from the weight files")
    ignored = {_HEAD} if model.config.tied else set()
    beside = tuple(model.ignored)
    left = (name for name in names - set(wanted) - ignored if not name.endswith(_DERIVED))
    extra = sorted(name for name in left if not name.startswith(beside))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise WeightsError(
            f"{checkpoint.directory}: the weight files hold {brief(extra[0])}{more}, which a {model.config.family} "
            "model of this config.json has no place for"
        )
    for name, (slot, *_) in wanted.items():
        if checkpoint.shape(name) != slot.stored:
            raise WeightsError(
                f"{checkpoint.directory}: tensor {brief(name)} has shape {brief(list(checkpoint.shape(name)))}, "
                f"config.json says {brief(list(slot.stored))}"
            )


def _check_tied(checkpoint: Source, embedding: str) -> None:
    """A head that is stored beside the embedding it is tied to must be that embedding, or logits would change."""
    digests = set()
    for _, tensor in checkpoint.stream([_HEAD, embedding]):
        digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
        for rows in tensor.split(_HASHED_ROWS):
            digest.update(rows.float().contiguous().numpy().tobytes())
        digests.add(digest.digest())
    if len(digests) > 1:
        raise WeightsError(
            f"{checkpoint.directory}: config.json ties the head to the embedding, yet {_HEAD!r} is stored and "
            'differs; with "tie_word_embeddings": false it would be used'
        )
