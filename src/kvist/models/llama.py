"""Llama, Mistral, Qwen2 and Qwen3: rotary positions, RMSNorm, gated SiLU, grouped KV heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from kvist.cache.view import LayerView
from kvist.models.config import ModelConfig
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.layers import RMSNorm, RopeTable, Rotation
from kvist.models.linear import Linear, PackedOperators


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

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, heads + 2 kv_heads, head_dim]
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        layer.write(rotation.apply(k), v)
        return self.out(layer.attend(rotation.apply(q), self.scale).flatten(1))


@dataclass(frozen=True)
class _Operands:
    """A layer's packed weights, norms and biases, in the order in which operators take them."""

    weights: list[Tensor]
    forms: list[list[int]]
    extras: list[Tensor | None]
    heads: list[int]

    @cached_property
    def flat(self) -> list[int]:
        return [number for form in self.forms for number in form]


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
        self._operators: PackedOperators | None = None

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`. With packed weights in one fused operator, or in two where the cache has no
        kernel for the attention between them."""
        if self._operators is not None:
            return self._packed(self._operators, x, rotation, layer)
        x = x + self.attention(self.attention_norm(x), rotation, layer)
        return x + self.down(self._activations.silu_mul(self.gate_up(self.mlp_norm(x))))

    def fuse(self, operators: PackedOperators) -> None:
        """From now on its packed weights are read by fused operators, where they can be."""
        if self.gate_up.bias is None and self.down.bias is None:
            self._operators = operators

    @cached_property
    def _operands(self) -> _Operands:
        """What the fused operators take of the layer, looked up once."""
        a = self.attention
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (a.q_norm, a.k_norm))
        weights, forms = zip(*(weight.operand for weight in (a.qkv, a.out, self.gate_up, self.down)), strict=True)
        norms = self.attention_norm.weight, self.mlp_norm.weight
        extras = [norms[0], a.qkv.bias, q_norm, k_norm, a.out.bias, None, norms[1], None]
        return _Operands(list(weights), list(forms), extras, [a.heads, a.kv_heads, a.head_dim])

    def _packed(self, operators: PackedOperators, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        own, scale, eps = self._operands, self.attention.scale, self.mlp_norm.eps
        norm, qkv_bias, q_norm, k_norm, out_bias, _, mlp_norm, _ = own.extras
        if (cache := layer.operands) is not None:
            angles = rotation.cos, rotation.sin
            return operators.packed_layer(
                x, own.weights, own.flat, own.extras, own.heads, eps, scale, False, *angles, *cache
            )
        qkv, out, gate_up, down = zip(own.weights, own.forms, strict=True)
        heads = own.heads, q_norm, k_norm, rotation.cos, rotation.sin
        rows = operators.packed_project(x, norm, eps, *qkv, qkv_bias, *heads).unflatten(-1, (-1, own.heads[2]))
        q, k, v = rows.split((own.heads[0], own.heads[1], own.heads[1]), dim=1)
        layer.write(k, v)
        attended = layer.attend(q, scale).flatten(1)
        mlp = mlp_norm, eps, *gate_up, *down, None, False
        return operators.packed_ending(x, attended, *out, out_bias, None, *mlp)


class Llama(Decoder):
    """See `Decoder`."""

    def __init__(self, config: ModelConfig, activations: Activations) -> None:
        blocks = (Block(config, activations) for _ in range(config.layers))
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))
        assert config.rope is not None
        self._rope = RopeTable(config.rope, config.head_dim)

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        x = self.embed(tokens)
        rotation = self._rope.at(positions, x.dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotation, layer)
        return self.norm(x)

    def pack(self, bits: int, operators: PackedOperators) -> None:
        super().pack(bits, operators)
        for block in self.blocks:
            block.fuse(operators)

    def slots(self) -> list[Slot]:
        config = self.config
        embedding = (config.vocab_size, config.hidden_size)
        slots = [Slot("model.embed_tokens.weight", "embed.weight", 0, embedding)]
        for index in range(config.layers):
            slots += self._block_slots(f"model.layers.{index}.", f"blocks.{index}.")
        slots.append(Slot("model.norm.weight", "norm.weight", 0, (config.hidden_size,)))
        if not config.tied:
            slots.append(Slot("lm_head.weight", "head.weight", 0, embedding))
        return slots

    def _block_slots(self, theirs: str, ours: str) -> list[Slot]:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        slots: list[Slot] = []

        def linear(name: str, parameter: str, start: int, rows: int, columns: int, bias: bool) -> None:
            slots.append(Slot(f"{theirs}{name}.weight", f"{ours}{parameter}.weight", start, (rows, columns)))
            if bias:
                slots.append(Slot(f"{theirs}{name}.bias", f"{ours}{parameter}.bias", start, (rows,)))

        slots.append(Slot(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", 0, (hidden,)))
        linear("self_attn.q_proj", "attention.qkv", 0, q, hidden, config.qkv_bias)
        linear("self_attn.k_proj", "attention.qkv", q, kv, hidden, config.qkv_bias)
        linear("self_attn.v_proj", "attention.qkv", q + kv, kv, hidden, config.qkv_bias)
        linear("self_attn.o_proj", "attention.out", 0, hidden, q, config.out_bias)
        if config.qk_norm:
            for side in ("q", "k"):
                name = f"{side}_norm.weight"
                slots.append(Slot(f"{theirs}self_attn.{name}", f"{ours}attention.{name}", 0, (config.head_dim,)))
        slots.append(Slot(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", 0, (hidden,)))
        linear("mlp.gate_proj", "gate_up", 0, inner, hidden, config.mlp_bias)
        linear("mlp.up_proj", "gate_up", inner, inner, hidden, config.mlp_bias)
        linear("mlp.down_proj", "down", 0, hidden, inner, config.mlp_bias)
        return slots
