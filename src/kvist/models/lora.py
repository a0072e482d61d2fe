"""LoRA adapters (arXiv 2106.09685) as PEFT writes them: added to the weights as they are read, or to the rows of
requests that ask for one, any of them in one batch.

A row's bits depend on its own adapter alone: what an adapter adds is computed for the rows that have it, in as many
rows as agree with each other, and added to these."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.errors import ConfigError, WeightsError, brief
from kvist.models.decoder import Decoder, Product, Slot
from kvist.models.linear import Linear
from kvist.models.peft import CONFIG, PeftConfig
from kvist.weights.checkpoint import Checkpoint

FILE = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Embedding and head, which PEFT writes beside an adapter as they are where it cannot tell, or where it is told to.
_COPY = re.compile(
    r"base_model\.model\.(?:(.+)\.base_layer|(.*(?:embed_tokens|embed_in|embed_out|lm_head|wte)))\.weight"
)
_HEAD = "lm_head.weight"
_MOST_RANK = 4096
_COMPARED = 4096  # rows at once


@dataclass(frozen=True)
class Delta:
    """What is added to a weight [out, in]: `scale` * `up` [out, rank] times `down` [rank, in]."""

    down: Tensor
    up: Tensor
    scale: float

    def matrix(self) -> Tensor:
        """[out, in] float32."""
        return (self.up.float() @ self.down.float()) * self.scale


@dataclass(frozen=True)
class Adapter:
    """`id`: digest (hex) of its files, which names what is computed with it. `deltas`: by the base's tensors' names.
    `copies`: of tensors that the base should have as they are, what the file calls them by the base's names."""

    directory: Path
    id: str
    deltas: Mapping[str, Delta]
    copies: Mapping[str, str]


def load_adapter(directory: Path) -> Adapter:
    """Reads an adapter in PEFT's format. Raises `ConfigError` for a kind that is not supported, `WeightsError` for
    tensors that do not belong together."""
    config = PeftConfig(directory)
    sides: dict[str, dict[str, Tensor]] = {}
    checkpoint = Checkpoint(directory, FILE)
    copies = {f"{found[1] or found[2]}.weight": name for name in checkpoint.names() if (found := _COPY.fullmatch(name))}
    for name, tensor in checkpoint.stream(checkpoint.names() - set(copies.values())):
        found = _NAME.fullmatch(name)
        if found is None:
            raise WeightsError(
                f"{directory}: tensor {brief(name)} is no part of a LoRA adapter of a decoder's products"
            )
        sides.setdefault(found[1], {})[found[2]] = tensor.clone()
    deltas = {f"{module}.weight": _delta(directory, module, both, config) for module, both in sides.items()}
    digest = hashlib.sha256()
    for name in (CONFIG, FILE):
        with (directory / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Adapter(directory, digest.hexdigest(), deltas, copies)


def _delta(directory: Path, module: str, both: Mapping[str, Tensor], config: PeftConfig) -> Delta:
    if both.keys() != {"A", "B"}:
        raise WeightsError(f"{directory}: of {brief(module)} there is lora_{''.join(both)} alone")
    down, up = both["A"], both["B"]
    if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1] or not 1 <= len(down) <= _MOST_RANK:
        raise WeightsError(
            f"{directory}: {brief(module)} has lora_A {brief(list(down.shape))} and lora_B {brief(list(up.shape))}"
        )
    if not config.changes(module):
        raise ConfigError(f"{config.where}: its target_modules leave {brief(module)} out, of which there are tensors")
    if (rank := config.rank(module)) != len(down):
        raise ConfigError(
            f"{config.where}: {brief(module)} should be of rank {rank}, and its tensors are of {len(down)}"
        )
    alpha = config.alpha(module)
    scale = alpha / (math.sqrt(rank) if config.stabilized else rank)
    if not 0 < abs(scale) < math.inf:
        raise ConfigError(f"{config.where}: lora_alpha={alpha:g} for rank {rank} cannot be")
    return Delta(down, up, scale)


def check_base(adapter: Adapter, slots: Iterable[Slot]) -> dict[str, Slot]:
    """The slots of the tensors that an adapter changes, by name. Raises `WeightsError` for an adapter of another
    base."""
    known, found = {slot.name: slot for slot in slots}, {}
    for name, delta in adapter.deltas.items():
        slot, shape = known.get(name), (delta.up.shape[0], delta.down.shape[1])
        if slot is None or tuple(slot.stored[::-1] if slot.transposed else slot.stored) != shape:
            has = "none" if slot is None else f"one of {list(slot.stored)}"
            raise WeightsError(
                f"{adapter.directory} is an adapter of another model: it changes {brief(name)} of {list(shape)}, and "
                f"this one has {has}"
            )
        found[name] = slot
    return found


def check_copies(adapter: Adapter, slots: Iterable[Slot], base: Any) -> None:
    """Raises `WeightsError` unless the tensors that an adapter's file holds beside it are the base's own, as the file's
    type holds them. `base`: a `kvist.models.load.Source`."""
    if not adapter.copies:
        return
    names, file = base.names(), Checkpoint(adapter.directory, FILE)
    embedding = next((slot.name for slot in slots if slot.parameter == "embed.weight"), "")
    for name, stored in adapter.copies.items():
        own = embedding if name == _HEAD and name not in names else name  # the head may be the embedding
        if own not in names or base.shape(own) != file.shape(stored) or not _alike(base, own, file, stored):
            raise WeightsError(
                f"{adapter.directory} holds {brief(stored)}, which is not the base's: whole weights that were changed "
                "are not supported; where they were not, remove the tensor"
            )


def _alike(base: Any, own: str, file: Checkpoint, stored: str) -> bool:
    ((_, theirs),) = base.stream([own])
    ((_, copy),) = file.stream([stored])
    rows = zip(theirs.split(_COMPARED), copy.split(_COMPARED), strict=True)
    return all(torch.equal(one.to(other.dtype), other) for one, other in rows)


class MergedSource:
    """A checkpoint with an adapter added to it; see `kvist.models.load.Source`."""

    def __init__(self, base: Any, adapter: Adapter, slots: Sequence[Slot]) -> None:
        """Raises `WeightsError` for an adapter of another base."""
        self.directory: Path = base.directory
        self._base = base
        self._deltas = adapter.deltas
        self._slots = check_base(adapter, slots)
        check_copies(adapter, slots, base)

    def names(self) -> set[str]:
        names: set[str] = self._base.names()
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._base.shape(name)
        return shape

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._base.dtype(name)
        return dtype

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._base.stream(names):
            if name not in self._deltas:
                yield name, tensor
                continue
            added = self._deltas[name].matrix()
            yield name, tensor.float() + (added.T if self._slots[name].transposed else added)

    def copy_into(self, targets: Mapping[str, Any]) -> None:
        self._base.copy_into({name: place for name, place in targets.items() if name not in self._deltas})
        for name, tensor in self.stream([name for name in targets if name in self._deltas]):
            if self.shape(name) != tuple(targets[name].shape):
                raise WeightsError(f"{self.directory}: tensor {name!r} has shape {list(self.shape(name))}")
            targets[name].copy_(tensor)


@dataclass(frozen=True)
class _Site:
    """What one adapter adds to outputs `start` onwards of a product. `up` is scaled."""

    start: int
    down: Tensor
    up: Tensor


class Adapters:
    """The adapters that requests may ask for, attached to a decoder. `assign` says which rows of the next step have
    which."""

    def __init__(self, model: Decoder, adapters: Iterable[Adapter], dtype: torch.dtype) -> None:
        """Raises `WeightsError` for an adapter of another base, or of parts that cannot be changed row by row."""
        self.ids = [adapter.id for adapter in adapters]
        self.fit: Callable[[int], int] = lambda rows: rows
        self._rows: dict[str, Tensor] = {}
        self._sites: dict[Linear, dict[str, list[_Site]]] = {}
        slots, linears = model.slots(), {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Linear)}
        for adapter in adapters:
            for name, slot in check_base(adapter, slots).items():
                linear, delta = linears.get(slot.parameter), adapter.deltas[name]
                if linear is None or linear is model.head or slot.part is not None:
                    raise WeightsError(
                        f"{adapter.directory} changes {name!r}, which cannot be had for single requests; merge it into "
                        "the weights instead (kvist run --adapter)"
                    )
                site = _Site(slot.start, delta.down.to(dtype), (delta.up.float() * delta.scale).to(dtype))
                self._sites.setdefault(linear, {}).setdefault(adapter.id, []).append(site)
        for linear in self._sites:
            linear.added = self._add
        model.adapters = self

    def assign(self, names: Sequence[str]) -> None:
        """`names`: of each row of the next step, padding left out, the id of its adapter, or none."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name:
                rows.setdefault(name, []).append(row)
        self._rows = {name: torch.tensor(own) for name, own in rows.items()}

    def products(self) -> list[Product]:
        """The products of all adapters, whose widths have to agree as well."""
        sites = [site for own in self._sites.values() for parts in own.values() for site in parts]
        return [(matrix, None) for site in sites for matrix in (site.down, site.up)]

    def _add(self, linear: Linear, x: Tensor, out: Tensor) -> Tensor:
        """`out` [T, rows] with what the adapters of its rows add."""
        for name, rows in self._rows.items():
            for site in self._sites[linear].get(name, ()):
                count = len(rows)
                padded = x.new_zeros(self.fit(count), x.shape[1])
                padded[:count] = x[rows]
                added = F.linear(F.linear(padded, site.down), site.up)[:count]
                out[rows, site.start : site.start + added.shape[1]] += added
        return out
