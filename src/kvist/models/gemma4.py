"""Gemma 4: layers with a window and, every so many, one without, whose heads are larger and may have keys that are also
values; last layers that read the cache of earlier ones; an embedding of each token for each layer; experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvist.base.errors import ConfigError, brief
from kvist.cache.spec import Full, LayerSpec, Window, key_value, shared, tied
from kvist.cache.step import Tie
from kvist.cache.view import LayerView
from kvist.models.config import MAX_LAYERS, ModelConfig, Rope
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.experts import Experts, ExpertsConfig, check_count, choose
from kvist.models.gemma import RENAMED, SENSES, cap, cap_logits, gelu_mul, one_rope, read_gelu, text_keys
from kvist.models.keys import Keys
from kvist.models.layers import RMSNorm, RopeTable, Rotation
from kvist.models.linear import Embedding, Linear
from kvist.models.llama import outer_slots


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """`heads`, `kv_heads`, `head_dim`, `rope` are those of `local` layers, which have a window; `wide_...` of others.
    `tied_kv`: whether the keys of these are also their values. `sources`: of each layer whose cache it reads, itself or
    an earlier one. `each`: numbers of a token's embedding for each layer, of `each_vocab` tokens; 0: there is none."""

    local: tuple[bool, ...]
    wide_kv_heads: int
    wide_head_dim: int
    wide_rope: Rope
    tied_kv: bool
    sources: tuple[int, ...]
    double_wide: bool  # the MLPs of layers that read another's cache
    each: int
    each_vocab: int
    logit_cap: float
    experts: ExpertsConfig | None
    prefix: str = "model."

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        specs = list[LayerSpec]()
        for layer, source in enumerate(self.sources):
            if source != layer:
                specs.append(shared(source, specs[source]))
            elif self.local[layer]:
                kept = Window(self.windows[layer]) if self.windows[layer] else Full()
                specs.append(key_value(self.kv_heads, self.head_dim, kept))
            else:
                specs.append((tied if self.tied_kv else key_value)(self.wide_kv_heads, self.wide_head_dim))
        return tuple(specs)

    def naive_numbers(self) -> int:
        shapes = [self.shape(layer) for layer in range(self.layers)]
        return sum(2 * heads * dim for heads, dim in shapes)

    def shape(self, layer: int) -> tuple[int, int]:
        """KV heads of a layer, and a head's dimensions."""
        return (self.kv_heads, self.head_dim) if self.local[layer] else (self.wide_kv_heads, self.wide_head_dim)

    def inner(self, layer: int) -> int:
        """Numbers within the MLP of a layer."""
        return self.intermediate_size * (1 + (self.double_wide and self.sources[layer] != layer))


def read_gemma4(keys: Keys) -> Gemma4Config:
    """The config of a Gemma 4 that also sees or hears: its text decoder."""
    text = text_keys(keys, "gemma4_text")
    config = read(text)
    text.finish("gemma4_text")
    return replace(config, family="gemma4", prefix="model.language_model.")


def read(keys: Keys) -> Gemma4Config:
    """The config of a checkpoint of Gemma 4's text model."""
    keys.require("attention_bias", False)
    if (direction := keys.take("use_bidirectional_attention", str, "vision")) != "vision":
        raise ConfigError(f"{keys.where}: use_bidirectional_attention={brief(direction)} is not supported")
    layers, heads = keys.take("num_hidden_layers", int, 30), keys.take("num_attention_heads", int, 8)
    if not 1 <= layers <= MAX_LAYERS:
        raise ConfigError(f"{keys.where}: num_hidden_layers should be from 1 to {MAX_LAYERS:,}, got {layers}")
    local, kv_heads = _kinds(keys, layers), keys.take("num_key_value_heads", int, 4)
    tied_kv = keys.take("attention_k_eq_v", bool, False)
    wide_kv_heads, wide_head_dim = _wide(keys, local, kv_heads, tied_kv)
    if wide_kv_heads < 1 or heads % wide_kv_heads:
        raise ConfigError(f"{keys.where}: {heads} query heads do not divide among {wide_kv_heads} KV heads")
    positions, window = keys.take("max_position_embeddings", int, 131_072), keys.take("sliding_window", int, 512)
    ropes = keys.take("rope_parameters", dict, {})
    if not ropes:
        ropes = {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25}}
    return Gemma4Config(
        family="gemma4_text",
        vocab_size=keys.take("vocab_size", int, 262_144),
        hidden_size=keys.take("hidden_size", int, 2304),
        intermediate_size=keys.take("intermediate_size", int, 9216),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=keys.take("head_dim", int, 256),
        max_positions=positions,
        norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        activation=read_gelu(keys),
        rope=one_rope(keys, ropes, "sliding_attention", 10_000.0),
        wide_rope=one_rope(keys, ropes, "full_attention", 1_000_000.0),
        tied=keys.take("tie_word_embeddings", bool, True),
        windows=tuple(window if own and window < positions else 0 for own in local),
        local=local,
        wide_kv_heads=wide_kv_heads,
        wide_head_dim=wide_head_dim,
        tied_kv=tied_kv,
        sources=_sources(keys, local),
        double_wide=keys.take("use_double_wide_mlp", bool, False),
        each=keys.take("hidden_size_per_layer_input", int, 256),
        each_vocab=keys.take("vocab_size_per_layer_input", int, 262_144),
        logit_cap=cap(keys, "final_logit_softcapping", 0.0),
        experts=_experts(keys, layers),
    )


def _kinds(keys: Keys, layers: int) -> tuple[bool, ...]:
    """Which layers have a window: by default five of six, and never the last."""
    kinds = keys.take("layer_types", list, None)
    if kinds is None:
        local = tuple(bool((layer + 1) % 6) for layer in range(layers))
    elif len(kinds) != layers or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        raise ConfigError(f"{keys.where}: layer_types should name {layers} layers, got {brief(kinds)}")
    else:
        local = tuple(kind == "sliding_attention" for kind in kinds)
    return (*local[:-1], False)


def _wide(keys: Keys, local: Sequence[bool], kv_heads: int, tied_kv: bool) -> tuple[int, int]:
    """KV heads and dimensions of the layers without a window, as transformers writes it, or as it is published."""
    dim, heads = keys.take("global_head_dim", int, 512), keys.take("num_global_key_value_heads", int, None)
    by_layer = keys.take("per_layer_config", dict, None)
    if by_layer is None:
        return (heads if tied_kv and heads is not None else kv_heads), dim
    wide = {str(layer) for layer, own in enumerate(local) if not own}
    found = [Keys(one if isinstance(one, dict) else {}, f"{keys.where}: per_layer_config") for one in by_layer.values()]
    shapes = {(one.take("num_key_value_heads", int, kv_heads), one.take("head_dim", int)) for one in found}
    for one in found:
        one.finish()
    if {str(layer).lstrip("0") or "0" for layer in by_layer} != wide or len(shapes) != 1:
        raise ConfigError(f"{keys.where}: per_layer_config should say the same of all layers without a window")
    return shapes.pop()


def _sources(keys: Keys, local: Sequence[bool]) -> tuple[int, ...]:
    """The last layers, so many as are said to, read the last of the others that is of their kind."""
    count = keys.take("num_kv_shared_layers", int, 0)
    first = len(local) - count
    if count and not (0 <= count < len(local) and set(local[:first]) == set(local)):
        raise ConfigError(f"{keys.where}: num_kv_shared_layers={count} leaves no layer of each kind to read from")
    last = {own: layer for layer, own in enumerate(local[:first])}
    return tuple(layer if layer < first else last[own] for layer, own in enumerate(local))


def _experts(keys: Keys, layers: int) -> ExpertsConfig | None:
    used = keys.take("enable_moe_block", bool, False)
    count, chosen = keys.take("num_experts", int, 0), keys.take("top_k_experts", int, 0)
    inner = keys.take("moe_intermediate_size", int, 0)
    if not used:
        return None
    if not 1 <= chosen <= count <= 1 << 14 or not 1 <= inner <= 1 << 24:
        raise ConfigError(f"{keys.where}: {chosen} of {count} experts of {inner} numbers cannot be")
    check_count(count, layers, keys.where)
    return ExpertsConfig(count, chosen, inner, normed=True)


def _plain_norm(x: Tensor, eps: float) -> Tensor:
    """`x / rms(x)`, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention whose q, k and v are normed per head; q alone where another layer's cache is read."""

    def __init__(self, config: Gemma4Config, index: int) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, config.norm_eps
        self.kv_heads, self.head_dim = config.shape(index)
        self.reads = config.sources[index] != index
        self.tied = config.tied_kv and not config.local[index]
        sides = 0 if self.reads else 1 if self.tied else 2
        self.qkv = Linear(config.hidden_size, (self.heads + sides * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = None if self.reads else RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView, tie: Tie | None) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`. `tie`: where keys are made of values."""
        return self.out(self.attend(x, rotation, layer, tie))

    def attend(self, x: Tensor, rotation: Rotation, layer: LayerView, tie: Tie | None) -> Tensor:
        """The same before the last product, `[T, heads * head_dim]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, kv = qkv[:, : self.heads], qkv[:, self.heads :]
        q = rotation.apply(self.q_norm(q))
        if self.k_norm is not None:
            v = _plain_norm(kv[:, -self.kv_heads :], self.eps)
            layer.write(None if self.tied else rotation.apply(self.k_norm(kv[:, : self.kv_heads])), v)
        return layer.attend(q, 1.0, tie).flatten(1)


class Router(nn.Module):
    """Chooses experts by what a row is, whatever its size."""

    def __init__(self, hidden: int, config: ExpertsConfig, eps: float) -> None:
        super().__init__()
        self.proj = Linear(hidden, config.count)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.expert_scale = nn.Parameter(torch.ones(config.count))
        self._config, self._eps, self._root = config, eps, hidden**-0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[T, hidden]` → weights and experts, as `choose` gives them."""
        weights, experts = choose(self.proj(_plain_norm(x, self._eps) * self.scale * self._root), self._config)
        return weights * self.expert_scale[experts], experts


class Block(nn.Module):
    """Residual block with norms before its parts and behind them, and what the token's own embedding adds."""

    def __init__(self, config: Gemma4Config, index: int, activations: Activations) -> None:
        super().__init__()
        hidden, inner, eps = config.hidden_size, config.inner(index), config.norm_eps
        self.attention_norm, self.attended_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.attention = Attention(config, index)
        self.mlp_norm, self.out_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        # Experts stand between the MLP and what follows it, which fused operators do not know.
        self.gate_up = Linear(hidden, 2 * inner, paired=config.experts is None)
        self.down = Linear(inner, hidden)
        self.experts = None
        if config.experts is not None:
            self.router = Router(hidden, config.experts, eps)
            self.experts = Experts(hidden, config.experts, lambda x: gelu_mul(activations, x))
            self.dense_norm, self.experts_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
            self.expert_in_norm = RMSNorm(hidden, eps)
        self.each = config.each
        if config.each:
            self.each_gate = Linear(hidden, config.each)
            self.each_out = Linear(config.each, hidden)
            self.each_norm = RMSNorm(hidden, eps)
        self.scalar = nn.Parameter(torch.ones(1))
        self._activations = activations

    def forward(self, x: Tensor, each: Tensor | None, rotation: Rotation, layer: LayerView, tie: Tie | None) -> Tensor:
        """`x` `[T, hidden]`, `each` `[T, each]` → `[T, hidden]`."""
        if self.gate_up.is_paired:
            x = self._fused(x, self.attention.attend(self.attention_norm(x), rotation, layer, tie))
        else:
            x = x + self.attended_norm(self.attention(self.attention_norm(x), rotation, layer, tie))
            found = self.down(gelu_mul(self._activations, self.gate_up(self.mlp_norm(x))))
            if self.experts is not None:
                chosen = self.experts(self.expert_in_norm(x), *self.router(x))
                found = self.dense_norm(found) + self.experts_norm(chosen)
            x = x + self.out_norm(found)
        if each is not None:
            x = x + self.each_norm(self.each_out(self._activations.gelu(self.each_gate(x), True) * each))
        return x * self.scalar

    def _fused(self, x: Tensor, attended: Tensor) -> Tensor:
        """What stands behind the attention, in one operator."""
        out, eps = self.attention.out.operand, self.mlp_norm.eps
        mlp = self.mlp_norm.weight, eps, *self.gate_up.operand, *self.down.operand, self.out_norm.weight, True
        return self.gate_up.operators.packed_ending(x, attended, *out, None, self.attended_norm.weight, *mlp)


class Gemma4(Decoder):
    """See `Decoder`."""

    config: Gemma4Config
    renamed = RENAMED

    def __init__(self, config: Gemma4Config, activations: Activations) -> None:
        blocks = (Block(config, index, activations) for index in range(config.layers))
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        # Published checkpoints also hold keys and values of layers that read another's.
        unused = (index for index, source in enumerate(config.sources) if source != index)
        parts = [f"{config.prefix}layers.{index}.self_attn.{name}." for index in unused for name in _CACHED]
        self.ignored = (*SENSES, *parts)
        assert config.rope is not None
        self._ropes = {
            True: RopeTable(config.rope, config.head_dim),
            False: RopeTable(config.wide_rope, config.wide_head_dim),
        }
        if config.each:
            width = config.layers * config.each
            self.each = Embedding(config.each_vocab, width)
            self.each_proj = Linear(config.hidden_size, width)
            self.each_norm = RMSNorm(config.each, config.norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        config, x = self.config, self.embed(tokens)
        x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype)  # rounded as the checkpoint's authors do
        each = self._each(tokens, x) if config.each else None
        rotations = {own: rope.at(positions, x.dtype) for own, rope in self._ropes.items()}
        for index, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            part = None if each is None else each[:, index]
            x = block(x, part, rotations[config.local[index]], layer, self._tie(index))
        return self.norm(x)

    def _tie(self, index: int) -> Tie | None:
        """How a layer's keys are made of its values: as the layer does it that wrote them."""
        if self.config.local[index] or not self.config.tied_kv:
            return None
        weight = self.blocks[self.config.sources[index]].attention.k_norm.weight
        return Tie(weight.detach().float(), *self._ropes[False].by_position())

    def _each(self, tokens: Tensor, x: Tensor) -> Tensor:
        """What each layer is told of the tokens themselves, `[T, layers, each]`: from an embedding of their own and
        from the usual one."""
        config = self.config
        own = self.each(tokens)
        own = (own * torch.tensor(config.each**0.5, dtype=own.dtype)).unflatten(-1, (config.layers, -1))
        usual = (self.each_proj(x) * config.hidden_size**-0.5).unflatten(-1, (config.layers, -1))
        return (self.each_norm(usual) + own) * 2.0**-0.5

    def logits(self, hidden: Tensor) -> Tensor:
        return cap_logits(super().logits(hidden), self.config.logit_cap)

    def slots(self) -> list[Slot]:
        config, hidden = self.config, self.config.hidden_size
        slots = outer_slots(config, config.prefix)
        if config.each:
            width = config.layers * config.each
            for name, parameter, shape in (
                ("embed_tokens_per_layer", "each", (config.each_vocab, width)),
                ("per_layer_model_projection", "each_proj", (width, hidden)),
                ("per_layer_projection_norm", "each_norm", (config.each,)),
            ):
                slots.append(Slot(f"{config.prefix}{name}.weight", f"{parameter}.weight", 0, shape))
        for index in range(config.layers):
            slots += self._block_slots(index, f"{config.prefix}layers.{index}.", f"blocks.{index}.")
        return slots

    def _block_slots(self, index: int, theirs: str, ours: str) -> list[Slot]:
        config, hidden, inner = self.config, self.config.hidden_size, self.config.inner(index)
        kv_heads, dim = config.shape(index)
        reads, tied_kv = config.sources[index] != index, config.tied_kv and not config.local[index]
        q, kv = config.heads * dim, kv_heads * dim
        found: list[tuple[str, str, int, tuple[int, ...]]] = [
            (name, parameter, 0, (hidden,)) for name, parameter in _NORMS.items()
        ]
        found += [("self_attn.q_norm", "attention.q_norm", 0, (dim,))]
        found += [("self_attn.q_proj", "attention.qkv", 0, (q, hidden))]
        if not reads:
            found += [("self_attn.k_norm", "attention.k_norm", 0, (dim,))]
            found += [("self_attn.k_proj", "attention.qkv", q, (kv, hidden))]
        if not reads and not tied_kv:
            found += [("self_attn.v_proj", "attention.qkv", q + kv, (kv, hidden))]
        found += [("self_attn.o_proj", "attention.out", 0, (hidden, q))]
        found += [("mlp.gate_proj", "gate_up", 0, (inner, hidden)), ("mlp.up_proj", "gate_up", inner, (inner, hidden))]
        found += [("mlp.down_proj", "down", 0, (hidden, inner))]
        if config.each:
            found += [("per_layer_input_gate", "each_gate", 0, (config.each, hidden))]
            found += [("per_layer_projection", "each_out", 0, (hidden, config.each))]
            found += [("post_per_layer_input_norm", "each_norm", 0, (hidden,))]
        slots = [
            Slot(f"{theirs}{name}.weight", f"{ours}{place}.weight", start, shape) for name, place, start, shape in found
        ]
        slots.append(Slot(f"{theirs}layer_scalar", f"{ours}scalar", 0, (1,)))
        return slots if config.experts is None else slots + self._expert_slots(config.experts, theirs, ours)

    def _expert_slots(self, experts: ExpertsConfig, theirs: str, ours: str) -> list[Slot]:
        """The matrices of all experts of a layer stand in one tensor."""
        hidden, inner, count = self.config.hidden_size, experts.intermediate_size, experts.count
        slots = [
            Slot(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, (hidden,)) for name, norm in _EXPERT_NORMS.items()
        ]
        slots.append(Slot(f"{theirs}router.proj.weight", f"{ours}router.proj.weight", 0, (count, hidden)))
        slots.append(Slot(f"{theirs}router.scale", f"{ours}router.scale", 0, (hidden,)))
        slots.append(Slot(f"{theirs}router.per_expert_scale", f"{ours}router.expert_scale", 0, (count,)))
        for name, place, shape in (
            ("gate_up_proj", "gate_up", (2 * inner, hidden)),
            ("down_proj", "down", (hidden, inner)),
        ):
            for expert in range(count):
                place_of = f"{ours}experts.{place}.{expert}.weight"
                slots.append(Slot(f"{theirs}experts.{name}", place_of, 0, shape, part=expert, whole=(count, *shape)))
        return slots


_CACHED = ("k_proj", "v_proj", "k_norm")
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attended_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "out_norm",
}
_EXPERT_NORMS = {
    "post_feedforward_layernorm_1": "dense_norm",
    "post_feedforward_layernorm_2": "experts_norm",
    "pre_feedforward_layernorm_2": "expert_in_norm",
}
