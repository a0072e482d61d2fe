"""What a model will take, told from its config alone: its KV at growing contexts under each codec, and its weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from kvist.base.errors import ConfigError
from kvist.base.tables import Tabular
from kvist.base.units import format_bytes, plural
from kvist.cache.choice import parse_choice
from kvist.cache.layout import Layout, plan_layout
from kvist.cache.spec import LayerSpec, Reading, Window
from kvist.models.config import ModelConfig
from kvist.models.families import describe, load_config
from kvist.models.linear import uniform
from kvist.models.load import stored_dtype
from kvist.models.plain import PlainActivations
from kvist.service.gguf import GgufModel, open_gguf
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

    def __str__(self) -> str:
        if not self.numbers:
            return f"{plural(self.layers, 'layer')} · {self.what}"
        kept = f"of the last {self.tokens:,} tokens" if self.tokens else "of every token"
        return f"{plural(self.layers, 'layer')} · {self.what} · {self.numbers:,} numbers {kept}"


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
class Plan(Tabular):
    """`weights`: bytes by type, a GGUF file's own as `gguf`. `left_out`: codecs that cannot hold this model's keys and
    values, and why."""

    model: str
    family: str
    kinds: list[LayerKind]
    rows: list[ContextRow]
    weights: dict[str, int]
    left_out: dict[str, str]

    def tables(self) -> list[Table]:
        if not self.rows:
            return []
        contexts = list(dict.fromkeys(row.context for row in self.rows))
        table = Table(title="KV of one sequence, and how many times smaller than a naive one", title_justify="left")
        table.add_column("KV")
        for tokens in contexts:
            table.add_column(f"{tokens:,} tokens", justify="right")
        naive = {row.context: row.naive_bytes for row in self.rows}
        table.add_row("naive bf16", *(format_bytes(naive[tokens]) for tokens in contexts))
        for kv in dict.fromkeys(row.kv for row in self.rows):
            own = {row.context: row for row in self.rows if row.kv == kv}
            table.add_row(kv, *(f"{format_bytes(own[n].nbytes)} · {own[n].times_smaller:.1f}x" for n in contexts))
        return [table]

    def to_json(self) -> dict[str, object]:
        """See docs/json.md."""
        rows = [asdict(row) | {"times_smaller": row.times_smaller} for row in self.rows]
        return asdict(self) | {"rows": rows}


def plan_model(name: str, source: Path, kvs: Sequence[str], contexts: Sequence[int]) -> Plan:
    """`source`: a directory, of which nothing is read but the config, or a GGUF file, of which its beginning is. Raises
    `ConfigError` for a model that is not supported, or a choice of codecs that is none."""
    rows, left_out = list[ContextRow](), dict[str, str]()
    found = open_gguf(source) if source.suffix == ".gguf" else None
    config = load_config(source) if found is None else found.config
    for kv in kvs:
        choice = parse_choice(kv)
        choice.check(config.layer_specs())
        try:
            layout = plan_layout(config.layer_specs(), choice)
        except ConfigError as error:
            left_out[kv] = str(error)
            continue
        rows += [_row(config, layout, kv, context) for context in contexts]
    weights = _weights(config)
    if found is not None:
        weights = {"gguf": _own_weights(found)} | weights
    return Plan(name, config.family, layer_kinds(config), rows, weights, left_out)


def context_row(config: ModelConfig, kv: str, context: int) -> ContextRow:
    """One codec at one context, whole blocks and open ones included."""
    return _row(config, plan_layout(config.layer_specs(), parse_choice(kv)), kv, context)


def _row(config: ModelConfig, layout: Layout, kv: str, context: int) -> ContextRow:
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


def _own_weights(found: GgufModel) -> int:
    """Those of a GGUF file, in memory as they are opened where nothing else is asked for."""
    model = describe(found.config, PlainActivations())
    grouping = found.grouping(model.slots())
    if grouping is None:
        return weight_bytes(model, stored_dtype(found.checkpoint))
    model.pack(grouping, None)  # type: ignore[arg-type]  # it is only measured
    return weight_bytes(model, torch.float32)
