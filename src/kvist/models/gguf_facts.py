"""What is read of a GGUF file of one architecture: its metadata key by key, its rotary positions, and its tensors'
names in the terms of Hugging Face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvist.base.errors import ConfigError, WeightsError
from kvist.models.config import MAX_LAYERS, ModelConfig
from kvist.models.keys import longrope_scale, yarn_scale
from kvist.weights.gguf import Kind, woven_rows
from kvist.weights.gguf_header import GgufHeader

BLOCK = "model.layers.{}."
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Architecture:
    """`config`: what the metadata says, in Hugging Face's keys. `block`, `outer`: names of tensors, theirs to ours.
    `woven`: q and k have their rotated halves woven into each other. `turned`: linear weights that the checkpoints of
    Hugging Face store as [in, out]. `added`: by the end of a tensor's name, what the converter has added to all of its
    numbers. `experts`: tensors that hold a matrix of every expert. `named`: those of a block whose whole names are
    others. `split`: of each head, its matrix of keys, turned, in one tensor and its matrix of values in another, where
    Hugging Face has the rows of all in one."""

    config: Callable[["Facts"], dict[str, Any]]
    block: Mapping[str, str]
    outer: Mapping[str, str]
    prefix: str = BLOCK
    woven: bool = False
    turned: frozenset[str] = frozenset()
    added: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    split: tuple[str, str, str] | None = None  # keys and values, theirs; ours

    def order(self, theirs: str, config: ModelConfig) -> np.ndarray | None:
        """In which order the rows of a block's tensor lie in the file; None where it is their own."""
        if self.woven and theirs in ("attn_q", "attn_k"):
            heads = config.heads if theirs == "attn_q" else config.kv_heads
            return woven_rows(heads * config.head_dim, heads)
        if theirs == "attn_qkv" and getattr(config, "interleaved", False):  # q, k and v of all heads behind each other
            rows = np.arange(3 * config.heads * config.head_dim)
            return rows.reshape(3, config.heads, config.head_dim).swapaxes(0, 1).reshape(-1)
        return None


_MOST_NAMED = 2  # keys in a message
# What changes nothing, or says again what the tensors say.
_INERT = frozenset(
    {
        "attention.layer_norm_epsilon",
        "expert_count",
        "expert_used_count",
        "rope.scaling.finetuned",
        "rope.scaling.orig_ctx_len",
        "rope.scaling.original_context_length",
        "tensor_data_layout",
        "vocab_size",
    }
)


class Facts:
    """The metadata of the file's architecture, key by key. What nobody asked for may change the mathematics."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._prefix = f"{header.architecture}."
        self._rest = {key.removeprefix(self._prefix) for key in header.metadata if key.startswith(self._prefix)}

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """See `GgufHeader.get`; without the architecture's name before the key."""
        self._rest.discard(key)
        return self.header.get(self._prefix + key, kind, default)

    def has(self, key: str) -> bool:
        return self._prefix + key in self.header.metadata

    def require(self, key: str, expected: Any) -> None:
        """Raises `ConfigError` for any other value than `expected`; the key may be absent."""
        if (value := self.get(key, type(expected), expected)) != expected:
            raise ConfigError(f"{self.header.path}: {self._prefix}{key:.80} = {value!r:.80} is not supported")

    def layers(self) -> int:
        """Raises `ConfigError` for a number of layers that nobody could build."""
        layers = self.get("block_count", int)
        if not 1 <= layers <= MAX_LAYERS:
            raise ConfigError(f"{self.header.path}: {self._prefix}block_count should be from 1 to {MAX_LAYERS:,}")
        return int(layers)

    def by_layer(self, key: str, kind: type, layers: int) -> list[Any]:
        """A value for each layer; one may be said of all. Raises `WeightsError`."""
        value = self.header.metadata.get(self._prefix + key)
        if not isinstance(value, list):
            return [self.get(key, kind)] * layers
        self._rest.discard(key)
        if len(value) != layers:
            raise WeightsError(f"{self.header.path}: {self._prefix}{key} is said of {len(value)} layers of {layers}")
        return self.header.numbers(self._prefix + key, kind)

    def finish(self) -> None:
        """Raises `ConfigError` for keys that were not asked for and are not known to change nothing."""
        zero = {key for key in self._rest if self.header.metadata[self._prefix + key] in (0, False, "")}
        if unknown := sorted(self._rest - _INERT - zero):
            shown = ", ".join(f"{self._prefix}{key:.80}" for key in unknown[:_MOST_NAMED])
            others = f" and {len(unknown) - _MOST_NAMED} others" if len(unknown) > _MOST_NAMED else ""
            raise ConfigError(f"{self.header.path}: {shown}{others} may change the mathematics and is not supported")


def rope_of(facts: Facts) -> dict[str, Any]:
    """What Hugging Face calls `rope_parameters`. Raises `ConfigError` for another scaling than those below."""
    header, theta = facts.header, facts.get("rope.freq_base", float, 10_000.0)
    factor = facts.get("rope.scaling.factor", float, 0.0) or facts.get("rope.scale_linear", float, 0.0) or 1.0
    # A factor alone divides all frequencies; where the file says "none", it is not used.
    kind = facts.get("rope.scaling.type", str, "none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise ConfigError(
            f"{header.path}: RoPE scaling {kind!r:.80} is not supported (none, linear, longrope and yarn are)"
        )
    if {LONG_FACTORS, SHORT_FACTORS} & header.tensors.keys() or kind == "longrope":
        _alone(facts, kind in ("none", "longrope") and factor == 1, "long and short factors")
        return {"rope_type": "longrope", "rope_theta": theta} | _longrope(facts)
    if ROPE_FACTORS in header.tensors:
        _alone(facts, kind == "none", ROPE_FACTORS)
        facts.require("rope.scaling.attn_factor", 1.0)
        return {"rope_type": "divided", "rope_theta": theta, "divisors": factors_of(header, ROPE_FACTORS)}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor} | _yarn(facts, factor)
    facts.require("rope.scaling.attn_factor", 1.0)
    if kind == "linear" and factor != 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def _alone(facts: Facts, holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"{facts.header.path}: {what} beside another scaling of RoPE are not supported")


def _yarn(facts: Facts, factor: float) -> dict[str, Any]:
    """All but the factor. `yarn_attn_factor` is what a config has as `attention_factor`; `attn_factor` multiplies what
    follows from the factor, as llama.cpp has it."""
    facts.require("rope.scaling.yarn_ext_factor", 1.0)
    positions = facts.get("context_length", int)
    old = facts.get("rope.scaling.orig_ctx_len", int, positions)
    found = {
        "original_max_position_embeddings": facts.get("rope.scaling.original_context_length", int, old),
        "beta_fast": facts.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": facts.get("rope.scaling.yarn_beta_slow", float, 1.0),
    }
    whole = facts.get("rope.scaling.yarn_attn_factor", float, None)
    times = facts.get("rope.scaling.attn_factor", float, 1.0)
    if times != 1:
        whole = (yarn_scale(factor, 1.0) if whole is None else whole) * times
    return found if whole is None else found | {"attention_factor": whole}


def factors_of(header: GgufHeader, name: str) -> list[float]:
    """A short vector of float32. Raises `WeightsError` for anything else."""
    factors = header.tensors.get(name)
    if factors is None or factors.kind is not Kind.F32 or len(factors.shape) != 1 or factors.nbytes > 1 << 16:
        raise WeightsError(f"{header.path}: tensor {name!r} should be a short list of float32")
    with factors.path.open("rb") as file:
        file.seek(factors.start)
        return [float(number) for number in np.frombuffer(file.read(factors.nbytes), np.float32)]


def _longrope(facts: Facts) -> dict[str, Any]:
    positions = facts.get("context_length", int)
    original = facts.get("rope.scaling.original_context_length", int)
    found = {
        "original_max_position_embeddings": original,
        "long_factor": factors_of(facts.header, LONG_FACTORS),
        "short_factor": factors_of(facts.header, SHORT_FACTORS),
    }
    if original < 1:
        raise ConfigError(f"{facts.header.path}: the context was of {original} tokens before it was made longer")
    usual = longrope_scale(positions / original, original)
    scale = facts.get("rope.scaling.attn_factor", float, 1.0)
    # The file has it in float32: the usual one is not to change by that.
    return found if abs(scale - usual) < 1e-6 else found | {"attention_factor": scale}
