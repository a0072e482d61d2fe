"""GPT-NeoX (Pythia), Phi-2 and StableLM: LayerNorm, positions that rotate the first part of a head, and attention and
MLP one after the other, or side by side."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvist.base.errors import ConfigError
from kvist.cache.view import LayerView
from kvist.models.config import Activation, ModelConfig
from kvist.models.decoder import Activations, Slot, linear_slots
from kvist.models.keys import Keys, read_activation, read_rope
from kvist.models.layers import Rotation
from kvist.models.linear import Linear
from kvist.models.rotary import RotaryDecoder


@dataclass(frozen=True)
class NeoxConfig(ModelConfig):
    """`parallel`: attention and MLP both read what comes in; `one_norm`: through the same norm. `gated`: the MLP has
    gates. `interleaved`: q, k and v of one head after another stand together in the product."""

    parallel: bool = False
    one_norm: bool = False
    gated: bool = False
    interleaved: bool = False


def read_neox(keys: Keys) -> NeoxConfig:
    """The config of a GPT-NeoX checkpoint."""
    theta, share = keys.take("rotary_emb_base", float, 10_000.0), keys.take("rotary_pct", float, 0.25)
    bias = keys.take("attention_bias", bool, True)
    heads = keys.take("num_attention_heads", int)
    return _read(
        keys,
        "gpt_neox",
        (theta, share),
        heads=heads,
        kv_heads=heads,
        activation=read_activation(keys, "hidden_act", "gelu", {Activation.GELU, Activation.GELU_TANH}),
        parallel=keys.take("use_parallel_residual", bool, True),
        interleaved=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
    )


def read_phi(keys: Keys) -> NeoxConfig:
    """The config of a Phi-1 or Phi-2 checkpoint."""
    keys.require("qk_layernorm", False)
    heads = keys.take("num_attention_heads", int)
    return _read(
        keys,
        "phi",
        (10_000.0, 0.5),
        heads=heads,
        kv_heads=keys.take("num_key_value_heads", int, heads),
        activation=read_activation(keys, "hidden_act", "gelu_new", {Activation.GELU, Activation.GELU_TANH}),
        parallel=True,
        one_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


def read_stablelm(keys: Keys) -> NeoxConfig:
    """The config of a StableLM checkpoint."""
    keys.stated(("num_key_value_heads",))
    parallel = keys.take("use_parallel_residual", bool, False)
    return _read(
        keys,
        "stablelm",
        (10_000.0, 0.25),
        heads=keys.take("num_attention_heads", int),
        kv_heads=keys.take("num_key_value_heads", int),
        activation=read_activation(keys, "hidden_act", "silu", {Activation.SILU}),
        parallel=parallel,
        one_norm=parallel,
        gated=True,
        qk_norm=keys.take("qk_layernorm", bool, False),
        qkv_bias=keys.take("use_qkv_bias", bool, False),
    )


def _read(keys: Keys, family: str, rope_defaults: tuple[float, float], heads: int, **facts: object) -> NeoxConfig:
    hidden = keys.take("hidden_size", int)
    if heads < 1 or hidden % heads:
        raise ConfigError(f"{keys.where}: hidden_size={hidden} does not divide among num_attention_heads={heads}")
    rope, share = read_rope(keys, *rope_defaults)
    make = partial(
        NeoxConfig,
        family=family,
        vocab_size=keys.take("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=keys.take("intermediate_size", int),
        layers=keys.take("num_hidden_layers", int),
        heads=heads,
        head_dim=hidden // heads,
        max_positions=keys.take("max_position_embeddings", int, 4096 if family == "stablelm" else 2048),
        norm_eps=keys.take("layer_norm_eps", float, 1e-5),
        rope=rope,
        rotated=int(hidden // heads * share),
        tied=keys.take("tie_word_embeddings", bool, False),
    )
    return make(**facts)


class HeadNorm(nn.Module):
    """LayerNorm over each head, with weights of its own for each."""

    def __init__(self, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * dim))
        self._shape, self._eps = (heads, dim), eps

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[T, heads, dim]`, the same out."""
        return F.layer_norm(x, x.shape[-1:], eps=self._eps) * self.weight.view(self._shape)


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from one product."""

    def __init__(self, config: NeoxConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size, config.out_bias)
        norm = partial(HeadNorm, dim=config.head_dim, eps=config.norm_eps)
        self.q_norm = norm(config.heads) if config.qk_norm else None
        self.k_norm = norm(config.kv_heads) if config.qk_norm else None
        self._interleaved = config.interleaved

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        if self._interleaved:
            q, k, v = qkv.unflatten(1, (self.heads, 3)).unbind(2)
        else:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        layer.write(rotation.apply(k), v)
        return self.out(layer.attend(rotation.apply(q), self.scale).flatten(1))


class Block(nn.Module):
    """Residual block with norms before its parts."""

    def __init__(self, config: NeoxConfig, activations: Activations) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = None if config.one_norm else nn.LayerNorm(config.hidden_size, config.norm_eps)
        inner, bias = config.intermediate_size, config.mlp_bias
        self.up = Linear(config.hidden_size, (1 + config.gated) * inner, bias)
        self.down = Linear(inner, config.hidden_size, bias)
        self._parallel, self._gated = config.parallel, config.gated
        self._tanh = config.activation is Activation.GELU_TANH
        self._activations = activations

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, rotation, layer)
        if not self._parallel:
            assert self.mlp_norm is not None
            x = x + attended
            return x + self._mlp(self.mlp_norm(x))
        return x + attended + self._mlp(normed if self.mlp_norm is None else self.mlp_norm(x))

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        return self.down(
            self._activations.silu_mul(inner) if self._gated else self._activations.gelu(inner, self._tanh)
        )


class Neox(RotaryDecoder):
    """See `Decoder`."""

    config: NeoxConfig

    def __init__(self, config: NeoxConfig, activations: Activations) -> None:
        blocks = (Block(config, activations) for _ in range(config.layers))
        super().__init__(config, blocks, nn.LayerNorm(config.hidden_size, config.norm_eps))

    def slots(self) -> list[Slot]:
        names, hidden = _NAMES[self.config.family], self.config.hidden_size
        slots = [Slot(f"{names['embed']}.weight", "embed.weight", 0, (self.config.vocab_size, hidden))]
        for index in range(self.config.layers):
            slots += self._block_slots(names, names["layers"].format(index), f"blocks.{index}.")
        slots += [Slot(f"{names['norm']}.{kind}", f"norm.{kind}", 0, (hidden,)) for kind in ("weight", "bias")]
        if not self.config.tied:
            slots += linear_slots(names["head"], "head", 0, (self.config.vocab_size, hidden), self.config.head_bias)
        return slots

    def _block_slots(self, names: dict[str, str], theirs: str, ours: str) -> list[Slot]:
        config = self.config
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        norms = {"input_layernorm": "attention_norm"}
        if not config.one_norm:
            norms["post_attention_layernorm"] = "mlp_norm"
        slots = [
            Slot(f"{theirs}{name}.{kind}", f"{ours}{norm}.{kind}", 0, (hidden,))
            for name, norm in norms.items()
            for kind in ("weight", "bias")
        ]
        heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        start = 0
        for side, count in {"": 3 * config.heads}.items() if config.interleaved else heads.items():
            name = theirs + names["qkv"].format(side)
            slots += linear_slots(name, f"{ours}attention.qkv", start, (count * dim, hidden), config.qkv_bias)
            start += count * dim
        slots += linear_slots(
            theirs + names["out"], f"{ours}attention.out", 0, (hidden, heads["q"] * dim), config.out_bias
        )
        for side in ("q", "k") if config.qk_norm else ():
            slots += [
                Slot(
                    f"{theirs}self_attn.{side}_layernorm.norms.{head}.weight",
                    f"{ours}attention.{side}_norm.weight",
                    head * dim,
                    (dim,),
                )
                for head in range(heads[side])
            ]
        for place, name in enumerate(names["up"].split()):
            slots += linear_slots(theirs + name, f"{ours}up", place * inner, (inner, hidden), config.mlp_bias)
        return slots + linear_slots(theirs + names["down"], f"{ours}down", 0, (hidden, inner), config.mlp_bias)


_NAMES = {
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "layers": "gpt_neox.layers.{}.",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "qkv": "attention.query_key_value",
        "out": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "phi": {
        "embed": "model.embed_tokens",
        "layers": "model.layers.{}.",
        "norm": "model.final_layernorm",
        "head": "lm_head",
        "qkv": "self_attn.{}_proj",
        "out": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "stablelm": {
        "embed": "model.embed_tokens",
        "layers": "model.layers.{}.",
        "norm": "model.norm",
        "head": "lm_head",
        "qkv": "self_attn.{}_proj",
        "out": "self_attn.o_proj",
        "up": "mlp.gate_proj mlp.up_proj",
        "down": "mlp.down_proj",
    },
}
