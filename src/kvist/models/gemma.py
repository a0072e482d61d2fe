"""Gemma 2 and Gemma 3: norms around attention and MLP, gates of GELU, a window in most layers; Gemma 2 caps its scores
and its logits, Gemma 3 norms q and k and turns positions in layers with a window otherwise than in those without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvist.base.errors import ConfigError, brief
from kvist.cache.spec import Full, LayerSpec, Window, key_value
from kvist.cache.view import LayerView
from kvist.models.config import MAX_LAYERS, Activation, ModelConfig, Rope
from kvist.models.decoder import Activations, Decoder, Slot
from kvist.models.keys import Keys, read_activation, read_rope
from kvist.models.layers import RopeTable, Rotation
from kvist.models.linear import Linear
from kvist.models.llama import outer_slots

PATTERN = {"gemma2": 2, "gemma3_text": 6}  # by default every so many layers have no window


# What a model that also sees or hears has beside its text decoder: beginnings of names.
SENSES = tuple(
    f"{prefix}{name}."
    for prefix in ("model.", "")
    for name in ("vision_tower", "multi_modal_projector", "audio_tower", "embed_vision", "embed_audio")
)
# Names in such a checkpoint, and in those of older versions of transformers.
RENAMED = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """`scale`: of q.k. `local_rope`: of layers with a window. `softcap`, `logit_cap`: hold scores and logits within
    them; 0: nothing does. `prefix`: of the tensors' names in a checkpoint."""

    scale: float
    local_rope: Rope
    softcap: float = 0.0
    logit_cap: float = 0.0
    prefix: str = "model."

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        retentions = (Window(window) if window else Full() for window in self.windows)
        return tuple(key_value(self.kv_heads, self.head_dim, kept, self.softcap) for kept in retentions)


def read(keys: Keys, family: str) -> GemmaConfig:
    """The config of a checkpoint of Gemma 2 or of Gemma 3's text model."""
    rope, local = _ropes(keys) if family == "gemma3_text" else (read_rope(keys, 10_000.0)[0],) * 2
    keys.require("use_bidirectional_attention", False)
    keys.require("attention_bias", False)
    layers, scalar = keys.take("num_hidden_layers", int, 26), keys.take("query_pre_attn_scalar", float, 256.0)
    if not 0 < scalar < 1e9:
        raise ConfigError(f"{keys.where}: query_pre_attn_scalar should be positive, got {scalar}")
    positions = keys.take("max_position_embeddings", int, 8192 if family == "gemma2" else 131_072)
    caps = (50.0, 30.0) if family == "gemma2" else (0.0, 0.0)
    return GemmaConfig(
        family=family,
        vocab_size=keys.take("vocab_size", int, 256_000 if family == "gemma2" else 262_208),
        hidden_size=keys.take("hidden_size", int, 2304),
        intermediate_size=keys.take("intermediate_size", int, 9216),
        layers=layers,
        heads=keys.take("num_attention_heads", int, 8),
        kv_heads=keys.take("num_key_value_heads", int, 4),
        head_dim=keys.take("head_dim", int, 256),
        max_positions=positions,
        norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        activation=read_gelu(keys),
        rope=rope,
        local_rope=local,
        scale=scalar**-0.5,
        softcap=cap(keys, "attn_logit_softcapping", caps[0]),
        logit_cap=cap(keys, "final_logit_softcapping", caps[1]),
        qk_norm=family == "gemma3_text",
        tied=keys.take("tie_word_embeddings", bool, True),
        windows=read_windows(keys, layers, positions, _pattern(keys, PATTERN[family])),
    )


def _pattern(keys: Keys, default: int) -> int:
    """Every how many layers one has no window, where the layers are not named."""
    return keys.take("sliding_window_pattern", int, keys.take("_sliding_window_pattern", int, default))


def read_gelu(keys: Keys) -> Activation:
    """The activation, which has two names. Gemma's `hidden_act` of "gelu" has always meant the tanh form."""
    keys.take("hidden_act", str, "")
    return read_activation(keys, "hidden_activation", "gelu_pytorch_tanh", {Activation.GELU_TANH})


def cap(keys: Keys, name: str, default: float) -> float:
    """A soft cap, which may be left out (the default) or be null (none)."""
    found = keys.null_or(name, float, default) or 0.0
    if not 0 <= found < 1e6:
        raise ConfigError(f"{keys.where}: {name} should be positive, got {found}")
    return float(found)


def read_windows(keys: Keys, layers: int, positions: int, pattern: int) -> tuple[int, ...]:
    """The window of each layer, 0: none, which by default is every `pattern`-th."""
    window = keys.take("sliding_window", int, 4096)
    keys.require("sliding_window_size", window)
    if not 1 <= layers <= MAX_LAYERS:  # which is said by who builds the config
        return ()
    if pattern < 1 or window < 1:
        raise ConfigError(f"{keys.where}: a window of {window} tokens in all but every {pattern}th layer cannot be")
    kinds = keys.take("layer_types", list, [])
    if not kinds:
        kinds = ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    known = {"full_attention": 0, "sliding_attention": window if window < positions else 0}
    if len(kinds) != layers or any(not isinstance(kind, str) or kind not in known for kind in kinds):
        raise ConfigError(
            f"{keys.where}: layer_types names {layers} layers as {' or '.join(known)}, got {brief(kinds)}"
        )
    return tuple(known[kind] for kind in kinds)


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """Of Gemma 3's layers without a window and of those with one, as transformers 5 writes them and as it was
    before."""
    both = keys.take("rope_parameters", dict, None)
    if both is not None and (others := sorted(both.keys() - {"full_attention", "sliding_attention"})):
        raise ConfigError(f"{keys.where}: rope_parameters says something of {brief(others)}, which is no kind of layer")
    theta, local = keys.take("rope_theta", float, 1_000_000.0), keys.take("rope_local_base_freq", float, 10_000.0)
    if both is None:
        return read_rope(keys, theta)[0], Rope(local)
    return one_rope(keys, both, "full_attention", theta), one_rope(keys, both, "sliding_attention", local)


def one_rope(keys: Keys, both: dict[str, Any], kind: str, theta: float) -> Rope:
    """The rotation of the layers of a kind, of a dictionary by kinds."""
    own = both.get(kind) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"{keys.where}: rope_parameters should say {kind} as an object, got {brief(own)}")
    return read_rope(Keys({"rope_parameters": own}, keys.where), theta)[0]


class GemmaNorm(nn.Module):
    """`x / rms(x) * (1 + weight)` over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.factor, self.eps).to(x.dtype)

    @property
    def factor(self) -> Tensor:
        """What the normed numbers are multiplied with, float32."""
        return 1 + self.weight.float()


class Attention(nn.Module):
    """Grouped-query attention; q, k and v come from one product."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.scale = config.scale
        self.qkv = Linear(config.hidden_size, (config.heads + 2 * config.kv_heads) * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.hidden_size)
        self.q_norm = GemmaNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = GemmaNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        layer.write(rotation.apply(k), v)
        return self.out(layer.attend(rotation.apply(q), self.scale).flatten(1))


class Block(nn.Module):
    """Residual block with norms before its parts and behind them."""

    def __init__(self, config: GemmaConfig, activations: Activations) -> None:
        super().__init__()
        norm: Callable[[], GemmaNorm] = lambda: GemmaNorm(config.hidden_size, config.norm_eps)  # noqa: E731
        self.attention_norm, self.attended_norm = norm(), norm()
        self.attention = Attention(config)
        self.mlp_norm, self.out_norm = norm(), norm()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, paired=True)
        self.down = Linear(config.intermediate_size, config.hidden_size)
        self._activations = activations

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`. With packed weights in two fused operators, on either side of the
        attention."""
        if self.gate_up.is_paired:
            return self._fused(x, rotation, layer)
        x = x + self.attended_norm(self.attention(self.attention_norm(x), rotation, layer))
        inner = gelu_mul(self._activations, self.gate_up(self.mlp_norm(x)))
        return x + self.out_norm(self.down(inner))

    def _fused(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        a, operators, eps = self.attention, self.gate_up.operators, self.mlp_norm.eps
        heads = [a.heads, a.kv_heads, a.head_dim]
        norms = (None if norm is None else norm.factor for norm in (a.q_norm, a.k_norm))
        angles = rotation.cos, rotation.sin
        rows = operators.packed_project(
            x, self.attention_norm.factor, eps, *a.qkv.operand, None, heads, *norms, *angles
        )
        q, k, v = rows.unflatten(-1, (-1, a.head_dim)).split((a.heads, a.kv_heads, a.kv_heads), dim=1)
        layer.write(k, v)
        attended = layer.attend(q, a.scale).flatten(1)
        mlp = self.mlp_norm.factor, eps, *self.gate_up.operand, *self.down.operand, self.out_norm.factor, True
        return operators.packed_ending(x, attended, *a.out.operand, None, self.attended_norm.factor, *mlp)


def gelu_mul(activations: Activations, gate_up: Tensor) -> Tensor:
    """`[T, 2 I]` → gelu(first half) * second half, `[T, I]`, GELU in its tanh form."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activations.gelu(gate.contiguous(), True) * up


class Gemma(Decoder):
    """See `Decoder`."""

    config: GemmaConfig
    renamed = RENAMED
    ignored = SENSES

    def __init__(self, config: GemmaConfig, activations: Activations) -> None:
        blocks = (Block(config, activations) for _ in range(config.layers))
        super().__init__(config, blocks, GemmaNorm(config.hidden_size, config.norm_eps))
        assert config.rope is not None
        self._ropes = [RopeTable(rope, config.head_dim) for rope in (config.rope, config.local_rope)]

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        x = self.embed(tokens)
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)  # rounded as the checkpoint's authors do
        rotations = [rope.at(positions, x.dtype) for rope in self._ropes]
        for window, block, layer in zip(self.config.windows, self.blocks, layers, strict=True):
            x = block(x, rotations[window > 0], layer)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return cap_logits(super().logits(hidden), self.config.logit_cap)

    def slots(self) -> list[Slot]:
        config, hidden, inner = self.config, self.config.hidden_size, self.config.intermediate_size
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        slots = outer_slots(config, config.prefix)
        for index in range(config.layers):
            theirs, ours = f"{config.prefix}layers.{index}.", f"blocks.{index}."
            for name, norm in _NORMS.items():
                slots.append(Slot(f"{theirs}{name}.weight", f"{ours}{norm}.weight", 0, (hidden,)))
            for side in ("q", "k") if config.qk_norm else ():
                name = f"{side}_norm.weight"
                slots.append(Slot(f"{theirs}self_attn.{name}", f"{ours}attention.{name}", 0, (config.head_dim,)))
            for name, parameter, start, shape in (
                ("self_attn.q_proj", "attention.qkv", 0, (q, hidden)),
                ("self_attn.k_proj", "attention.qkv", q, (kv, hidden)),
                ("self_attn.v_proj", "attention.qkv", q + kv, (kv, hidden)),
                ("self_attn.o_proj", "attention.out", 0, (hidden, q)),
                ("mlp.gate_proj", "gate_up", 0, (inner, hidden)),
                ("mlp.up_proj", "gate_up", inner, (inner, hidden)),
                ("mlp.down_proj", "down", 0, (hidden, inner)),
            ):
                slots.append(Slot(f"{theirs}{name}.weight", f"{ours}{parameter}.weight", start, shape))
        return slots


_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attended_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "out_norm",
}


def cap_logits(logits: Tensor, cap: float) -> Tensor:
    """Logits held within `cap`, unless it is 0."""
    # tanh x = 1 - 2 / (1 + e^2x); `torch.tanh` has other bits in the tail of its vector loop.
    return cap * (1 - 2 / (1 + torch.exp(logits * (2 / cap)))) if cap else logits


def text_keys(keys: Keys, text_type: str) -> Keys:
    """What the config of a model that also sees or hears says of its text decoder."""
    text = Keys(keys.take("text_config", dict), f"{keys.where}: text_config")
    text.require("model_type", text_type)
    for name in ("vision_config", "audio_config"):
        keys.take(name, dict, {})
    for name in _SENSE_TOKENS:
        keys.take(name, int, 0)
    keys.require("tie_word_embeddings", True)
    return text


_SENSE_TOKENS = """
    mm_tokens_per_image boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id
    video_token_id boa_token_id eoa_token_id eoa_token_index audio_token_id vision_soft_tokens_per_image
""".split()


def read_gemma3(keys: Keys) -> GemmaConfig:
    """The config of a Gemma 3 that also sees: its text decoder."""
    text = text_keys(keys, "gemma3_text")
    config = read(text, "gemma3_text")
    text.finish("gemma3_text")
    return replace(config, family="gemma3", prefix="model.language_model.")
