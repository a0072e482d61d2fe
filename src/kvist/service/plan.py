"""What a model will take, told from its config alone: its KV at growing contexts under each codec, and its weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kvist.cache.choice import parse_choice
from kvist.cache.layout import plan_layout
from kvist.cache.spec import LayerSpec, Reading, Window
from kvist.models.config import ModelConfig
from kvist.models.families import describe, load_config
from kvist.models.linear import uniform
from kvist.models.plain import PlainActivations
from kvist.service.packing import BITS, weight_bytes

CONTEXTS = (4096, 32_768, 131_072)
KVS = ("bf16", "int8", "turbo4", "turbo3", "turbo2")
NAIVE_BYTES = 2  # of a number: bfloat16


@dataclass(frozen=True)
class LayerKind:
    """Layers that keep the same. `numbers`: of a token; `tokens`: that are kept at most, 0: all."""

    what: str
    layers: int
    numbers: int
    tokens: int


@dataclass(frozen=True)
class ContextRow:
    """The KV of one sequence. `naive_bytes`: of a cache in bfloat16 that keeps keys and values of every head of every
    layer, for all tokens."""

    kv: str
    context: int
    nbytes: int
    naive_bytes: int

    @property
    def times_smaller(self) -> float:
        return self.naive_bytes / self.nbytes


@dataclass(frozen=True)
class Plan:
    """`weights`: bytes by type."""

    model: str
    family: str
    kinds: list[LayerKind]
    rows: list[ContextRow]
    weights: dict[str, int]

    def to_json(self) -> dict[str, object]:
        """See docs/json.md."""
        rows = [asdict(row) | {"times_smaller": row.times_smaller} for row in self.rows]
        return asdict(self) | {"rows": rows}


def plan_model(name: str, directory: Path, kvs: Sequence[str], contexts: Sequence[int]) -> Plan:
    """Nothing is read but the config. Raises `ConfigError` for a config that is not supported, or a codec that cannot
    hold its streams."""
    config = load_config(directory)
    rows = [context_row(config, kv, context) for kv in kvs for context in contexts]
    return Plan(name, config.family, layer_kinds(config), rows, _weights(config))


def context_row(config: ModelConfig, kv: str, context: int) -> ContextRow:
    """One codec at one context, whole blocks and open ones included."""
    layout = plan_layout(config.layer_specs(), parse_choice(kv))
    return ContextRow(kv, context, layout.bytes_for(context), context * config.naive_numbers() * NAIVE_BYTES)


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
    """In the order in which they first stand."""
    found: dict[tuple[str, int, int], int] = {}
    for spec in config.layer_specs():
        tokens = spec.retention.size if isinstance(spec.retention, Window) else 0
        kind = _named(spec), sum(stream.heads * stream.dim for stream in spec.streams), tokens
        found[kind] = found.get(kind, 0) + 1
    return [LayerKind(what, layers, numbers, tokens) for (what, numbers, tokens), layers in found.items()]


def _named(spec: LayerSpec) -> str:
    if spec.source is not None:
        return "the cache of an earlier layer"
    shapes = ", ".join(f"{s.name} {s.heads} x {s.dim}" for s in spec.streams)
    return {Reading.APART: shapes, Reading.JOINED: f"latent: {shapes}", Reading.TIED: f"keys are values: {shapes}"}[
        spec.reading
    ]


def _weights(config: ModelConfig) -> dict[str, int]:
    found = {"bf16": weight_bytes(describe(config, PlainActivations()), torch.bfloat16)}
    for name, bits in BITS.items():
        model = describe(config, PlainActivations())
        model.pack(uniform(bits), None)  # type: ignore[arg-type]  # it is only measured
        found[name] = weight_bytes(model, torch.float32)
    return found
