"""GPT-2, and so nanoGPT's shape: learned positions, LayerNorm, biases, GELU, one KV head per query head."""

from collections.abc import Sequence

from torch import Tensor, nn

from kvist.base.errors import ConfigError
from kvist.cache.view import LayerView
from kvist.models.config import Activation, ModelConfig
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.keys import Keys, read_activation
from kvist.models.linear import Linear


def read(keys: Keys) -> ModelConfig:
    """The config of a checkpoint."""
    keys.require("scale_attn_weights", True)
    keys.require("scale_attn_by_inverse_layer_idx", False)
    hidden, heads = keys.take("n_embd", int, 768), keys.take("n_head", int, 12)
    positions = keys.take("n_positions", int, 1024)
    keys.require("n_ctx", positions)
    if heads < 1 or hidden % heads:
        raise ConfigError(f"{keys.where}: n_embd={hidden} does not divide among n_head={heads}")
    return ModelConfig(
        family="gpt2",
        vocab_size=keys.take("vocab_size", int, 50257),
        hidden_size=hidden,
        intermediate_size=keys.take("n_inner", int, 4 * hidden),
        layers=keys.take("n_layer", int, 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
        norm_eps=keys.take("layer_norm_epsilon", float, 1e-5),
        activation=read_activation(keys, "activation_function", "gelu_new", {Activation.GELU, Activation.GELU_TANH}),
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=keys.take("tie_word_embeddings", bool, True),
    )


class Attention(nn.Module):
    """Multi-head attention; q, k and v come from one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).chunk(3, dim=1)  # each [T, heads, head_dim]
        layer.write(k, v)
        return self.out(layer.attend(q, self.scale).flatten(1))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, activations: Activations) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self._tanh = config.activation is Activation.GELU_TANH
        self._activations = activations

    def forward(self, x: Tensor, layer: LayerView) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layer)
        return x + self.down(self._activations.gelu(self.up(self.mlp_norm(x)), self._tanh))


class GPT2(Decoder):
    """See `Decoder`."""

    renamed = (("transformer.", ""),)  # in the first checkpoints

    def __init__(self, config: ModelConfig, activations: Activations) -> None:
        blocks = (Block(config, activations) for _ in range(config.layers))
        super().__init__(config, blocks, nn.LayerNorm(config.hidden_size, config.norm_eps))
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        x = self.embed(tokens) + self.positions(positions)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, layer)
        return self.norm(x)

    def slots(self) -> list[Slot]:
        config = self.config
        embedding = (config.vocab_size, config.hidden_size)
        slots = [
            Slot("transformer.wte.weight", "embed.weight", 0, embedding),
            Slot("transformer.wpe.weight", "positions.weight", 0, (config.max_positions, config.hidden_size)),
        ]
        for index in range(config.layers):
            slots += self._block_slots(f"transformer.h.{index}.", f"blocks.{index}.")
        for kind in ("weight", "bias"):
            slots.append(Slot(f"transformer.ln_f.{kind}", f"norm.{kind}", 0, (config.hidden_size,)))
        if not config.tied:
            slots.append(Slot("lm_head.weight", "head.weight", 0, embedding))
        return slots

    def _block_slots(self, theirs: str, ours: str) -> list[Slot]:
        """GPT-2's checkpoints store linear weights as `[in, out]`."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        slots = [
            Slot(f"{theirs}{name}.{kind}", f"{ours}{parameter}.{kind}", 0, (hidden,))
            for name, parameter in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm"))
            for kind in ("weight", "bias")
        ]
        for name, parameter, columns, rows in (
            ("attn.c_attn", "attention.qkv", hidden, 3 * hidden),
            ("attn.c_proj", "attention.out", hidden, hidden),
            ("mlp.c_fc", "up", hidden, inner),
            ("mlp.c_proj", "down", inner, hidden),
        ):
            slots.append(Slot(f"{theirs}{name}.weight", f"{ours}{parameter}.weight", 0, (columns, rows), True))
            slots.append(Slot(f"{theirs}{name}.bias", f"{ours}{parameter}.bias", 0, (rows,)))
        return slots
