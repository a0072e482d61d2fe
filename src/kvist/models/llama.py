"""Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3 and MobileLLM: rotary positions, RMSNorm, gated SiLU, grouped KV
heads."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from kvist.base.errors import ConfigError, brief
from kvist.cache.view import LayerView, PagedViews
from kvist.models.config import MAX_LAYERS, Activation, ModelConfig
from kvist.models.decoder import Activations, Decoder, Slot, linear_slots
from kvist.models.keys import Keys, read_activation, read_rope
from kvist.models.layers import RMSNorm, RopeTable, Rotation
from kvist.models.linear import Linear, weights_of

# Where a family's defaults are not Llama's, these keys must be stated rather than guessed.
FAMILIES = {
    "llama": (),
    "mistral": ("max_position_embeddings", "num_key_value_heads", "sliding_window"),
    "qwen2": ("max_position_embeddings", "num_key_value_heads"),
    "qwen3": ("max_position_embeddings", "num_key_value_heads"),
    "qwen3_moe": ("max_position_embeddings", "num_key_value_heads"),
    "phi3": ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps"),
    "smollm3": ("max_position_embeddings", "num_key_value_heads"),
    "mobilellm": ("max_position_embeddings", "num_key_value_heads"),
}


def read(keys: Keys, family: str) -> ModelConfig:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3 and SmolLM3: one decoder, told apart by biases, the norm on q and k, what is
    rotated, names, and defaults."""
    keys.stated(FAMILIES[family])
    hidden = keys.take("hidden_size", int)
    heads = keys.take("num_attention_heads", int)
    if heads < 1:
        raise ConfigError(f"{keys.where}: num_attention_heads must be at least 1, got {heads}")
    fixed = {"qwen2": (True, False), "mistral": (False, False), "phi3": (False, False)}
    qkv_bias, out_bias = fixed.get(family, (None, None))
    if qkv_bias is None or out_bias is None:
        qkv_bias = out_bias = keys.take("attention_bias", bool, False)
    positions = keys.take("max_position_embeddings", int, 2048)
    keys.require("rope_interleaved", False)
    keys.require("use_mrope", False)
    layers = keys.take("num_hidden_layers", int)
    head_dim = keys.take("head_dim", int, 128 if family == "qwen3" else hidden // heads)
    theta = 2_000_000.0 if family == "smollm3" else 10_000.0
    rope, share = read_rope(keys, theta, positions=positions if family == "phi3" else None)
    if share != 1 and family != "phi3":
        raise ConfigError(f"{keys.where}: partial_rotary_factor={share} is not supported in a {family} model")
    if family == "phi3":
        keys.take("original_max_position_embeddings", int, positions)  # changes nothing without longrope
    repeats = 1 + keys.take("layer_sharing", bool, False) if family == "mobilellm" else 1
    tied = keys.take("tie_word_embeddings", bool, family == "smollm3")
    if family == "mobilellm":
        tied = keys.take("share_embedding", bool, tied) or tied
    return ModelConfig(
        family=family,
        vocab_size=keys.take("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=keys.take("intermediate_size", int),
        layers=layers,
        heads=heads,
        kv_heads=keys.take("num_key_value_heads", int, heads),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        activation=read_activation(keys, "hidden_act", "silu", {Activation.SILU}),
        rope=rope,
        rotated=None if share == 1 else int(head_dim * share),
        without_rope=_without_rope(keys, layers) if family == "smollm3" else (),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=keys.take("mlp_bias", bool, False) if family in ("llama", "smollm3", "mobilellm") else False,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=tied,
        repeats=repeats,
        windows=_windows(keys, family, positions, layers),
    )


def _without_rope(keys: Keys, layers: int) -> tuple[int, ...]:
    """SmolLM3's layers that do not rotate: those marked 0, or else every fourth."""
    interval = keys.take("no_rope_layer_interval", int, 4)
    marks = keys.take("no_rope_layers", list, None)
    if not 1 <= layers <= MAX_LAYERS:  # which is said by who builds the config
        return ()
    if marks is None:
        if interval < 1:
            raise ConfigError(f"{keys.where}: no_rope_layer_interval must be positive, got {interval}")
        return tuple(range(interval - 1, layers, interval))
    if len(marks) < layers or any(type(mark) is not int or mark not in (0, 1) for mark in marks):
        raise ConfigError(f"{keys.where}: no_rope_layers marks each of {layers} layers with 0 or 1, got {brief(marks)}")
    return tuple(layer for layer in range(layers) if not marks[layer])


def _windows(keys: Keys, family: str, positions: int, layers: int) -> tuple[int, ...]:
    """The window of each layer. One that is at least as long as the context is none. Only Qwen's configs have a switch
    for it, off by default, and a number of first layers without."""
    window = keys.take("sliding_window", int, None)
    in_use, first = True, 0
    if family in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        in_use = keys.take("use_sliding_window", bool, False)
        first = keys.take("max_window_layers", int, layers)
    if family == "smollm3" and in_use:
        keys.stated(["layer_types"])
    if not in_use or window is None or window >= positions:
        window = 0
    if window and family == "llama":
        raise ConfigError(
            f"{keys.where}: sliding_window={window} below max_position_embeddings={positions} is not supported in a "
            "model of type 'llama'"
        )
    kinds = keys.take("layer_types", list, [])
    if not 1 <= layers <= MAX_LAYERS:  # which is said by who builds the config
        return ()
    if not kinds:
        return (0,) * min(first, layers) + (window,) * (layers - min(first, layers)) if window else ()
    known = {"full_attention": 0, "sliding_attention": window}
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise ConfigError(f"{keys.where}: layer type {brief(kind)} is not supported ({', '.join(known)} are)")
    if len(kinds) != layers:
        raise ConfigError(f"{keys.where}: layer_types names {len(kinds)} layers of {layers}")
    return tuple(known[kind] for kind in kinds) if window else ()


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from one product. Qwen3 norms q and k per head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, heads + 2 kv_heads, head_dim]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotation.apply(q), rotation.apply(k)
        layer.write(k, v)
        return self.out(layer.attend(q, self.scale).flatten(1))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, activations: Activations) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        paired = not config.mlp_bias  # the fused operator has none
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias, paired)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self._activations = activations

    def forward(self, x: Tensor, rotation: Rotation | None, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`. With packed weights in two fused operators, on either side of the
        attention."""
        if self.fuses:
            return self._fused(x, rotation, layer)
        x = x + self.attention(self.attention_norm(x), rotation, layer)
        return x + self.down(self._activations.silu_mul(self.gate_up(self.mlp_norm(x))))

    @property
    def fuses(self) -> bool:
        """Whether the fused operators compute it: its matrices are packed, gates beside their ups, and the MLP has no
        biases."""
        return self.gate_up.is_paired and self.gate_up.bias is None

    @property
    def extras(self) -> list[Tensor | None]:
        """Norms and biases in the order in which the operator `packed_layers` takes them."""
        a = self.attention
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (a.q_norm, a.k_norm))
        return [self.attention_norm.weight, a.qkv.bias, q_norm, k_norm, a.out.bias, None, self.mlp_norm.weight, None]

    def _fused(self, x: Tensor, rotation: Rotation | None, layer: LayerView) -> Tensor:
        a, operators, eps = self.attention, self.gate_up.operators, self.mlp_norm.eps
        norm, qkv_bias, q_norm, k_norm, out_bias, _, mlp_norm, _ = self.extras
        heads = [a.heads, a.kv_heads, a.head_dim]
        angles = (None, None) if rotation is None else (rotation.cos, rotation.sin)
        rows = operators.packed_project(x, norm, eps, *a.qkv.operand, qkv_bias, heads, q_norm, k_norm, *angles)
        q, k, v = rows.unflatten(-1, (-1, a.head_dim)).split((a.heads, a.kv_heads, a.kv_heads), dim=1)
        layer.write(k, v)
        attended = layer.attend(q, a.scale).flatten(1)
        mlp = mlp_norm, eps, *self.gate_up.operand, *self.down.operand, None, False
        return operators.packed_ending(x, attended, *a.out.operand, out_bias, None, *mlp)


class Llama(Decoder):
    """See `Decoder`."""

    def __init__(self, config: ModelConfig, activations: Activations) -> None:
        blocks = (Block(config, activations) for _ in range(config.layers))
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        assert config.rope is not None
        self._rope = RopeTable(config.rope, config.rotary_dim)
        self._without_rope = frozenset(config.without_rope)

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        x = self.embed(tokens)
        rotation = self._rope.at(positions, x.dtype)
        if isinstance(layers, PagedViews) and (whole := self._whole) is not None and layers.operands is not None:
            x = whole(x, rotation.cos, rotation.sin, *layers.operands)
            return self.norm(x)
        for index, layer in enumerate(layers):
            block = self.blocks[index // self.config.repeats]
            x = block(x, None if index in self._without_rope else rotation, layer)
        return self.norm(x)

    @cached_property
    def _whole(self) -> Callable[..., Tensor] | None:
        """All layers in one operator, where their weights are packed: looking up what it takes is done once. It takes
        `x`, the angles and the cache's operands."""
        blocks = list(self.blocks)
        forms = [[weight.form for weight in weights_of(block).values()] for block in blocks]
        alike = all(form == forms[0] for form in forms) and not self._without_rope and self.config.repeats == 1
        if not alike or not all(block.fuses for block in blocks):
            return None
        products = [(b.attention.qkv, b.attention.out, b.gate_up, b.down) for b in blocks]
        weights = [linear.operand[0] for four in products for linear in four]
        flat = [number for linear in products[0] for number in linear.operand[1]]
        extras = [tensor for block in blocks for tensor in block.extras]
        first = blocks[0].attention
        heads = [first.heads, first.kv_heads, first.head_dim]
        operator, eps = first.qkv.operators.packed_layers, blocks[0].mlp_norm.eps

        def whole(x: Tensor, *cache: Any) -> Tensor:
            return operator(x, weights, flat, extras, heads, eps, first.scale, False, *cache)

        return whole

    def slots(self) -> list[Slot]:
        slots = outer_slots(self.config)
        for index in range(self.config.layers):
            theirs, ours = f"model.layers.{index}.", f"blocks.{index}."
            slots += attention_slots(self.config, theirs, ours) + mlp_slots(self.config, theirs, ours)
        return slots


def outer_slots(config: ModelConfig, prefix: str = "model.") -> list[Slot]:
    """Of the embedding, the last norm and the head."""
    embedding = (config.vocab_size, config.hidden_size)
    slots = [
        Slot(f"{prefix}embed_tokens.weight", "embed.weight", 0, embedding),
        Slot(f"{prefix}norm.weight", "norm.weight", 0, (config.hidden_size,)),
    ]
    return slots if config.tied else [*slots, Slot("lm_head.weight", "head.weight", 0, embedding)]


def attention_slots(config: ModelConfig, theirs: str, ours: str) -> list[Slot]:
    """Of one block's attention and both norms."""
    hidden, q, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    slots = [Slot(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, (hidden,)) for name, norm in norms.items()]
    # Phi-3's checkpoints have the products as they are computed.
    parts = {"qkv": q + 2 * kv} if config.family == "phi3" else {"q": q, "k": kv, "v": kv}
    start = 0
    for name, rows in parts.items():
        place = f"{ours}attention.qkv"
        slots += linear_slots(f"{theirs}self_attn.{name}_proj", place, start, (rows, hidden), config.qkv_bias)
        start += rows
    slots += linear_slots(f"{theirs}self_attn.o_proj", f"{ours}attention.out", 0, (hidden, q), config.out_bias)
    for side in ("q", "k") if config.qk_norm else ():
        name = f"{side}_norm.weight"
        slots.append(Slot(f"{theirs}self_attn.{name}", f"{ours}attention.{name}", 0, (config.head_dim,)))
    return slots


def mlp_slots(config: ModelConfig, theirs: str, ours: str) -> list[Slot]:
    """Of one block's gated MLP."""
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    parts = {"gate_up": 2 * inner} if config.family == "phi3" else {"gate": inner, "up": inner}
    slots, start = list[Slot](), 0
    for name, rows in parts.items():
        slots += linear_slots(f"{theirs}mlp.{name}_proj", f"{ours}gate_up", start, (rows, hidden), bias)
        start += rows
    return slots + linear_slots(f"{theirs}mlp.down_proj", f"{ours}down", 0, (hidden, inner), bias)
