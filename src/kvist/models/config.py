"""One frozen description of a decoder, and the readers that make it from a checkpoint's `config.json`.

A key that a reader does not know may change the mathematics, so it is refused by name; keys known to change
nothing at inference stand in `INERT`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kvist.base.errors import ConfigError
from kvist.cache.spec import Full, LayerSpec, Window, key_value

# Far above any model; what is larger is a damaged file, and would be built for hours before memory ran out.
MAX_SIZE = 2**24
MAX_LAYERS = 4096


class Activation(StrEnum):
    SILU = "silu"
    GELU_TANH = "gelu_tanh"
    GELU = "gelu"


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency-dependent RoPE scaling: long wavelengths divided by `factor`, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not (0 < self.factor < math.inf and 0 < self.low_freq_factor < self.high_freq_factor < math.inf):
            raise ConfigError(f"RoPE: llama3 scaling needs positive factors, the low one below the high, got {self}")
        if self.original_max_positions < 1:
            raise ConfigError(f"RoPE: original_max_position_embeddings must be at least 1, got {self}")


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the whole head, halves rotated (arXiv 2104.09864, in Llama's half-split order)."""

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] = ()  # of each frequency, or none

    def __post_init__(self) -> None:
        for name, value in {"rope_theta": self.theta, "factor": self.linear_factor}.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"RoPE: {name} must be positive and finite, got {value}")
        if not all(0 < number < math.inf for number in self.divisors):
            raise ConfigError("RoPE: divisors must be positive and finite")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the mathematics of a decoder. Sizes in numbers, `max_positions` in tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: Activation
    rope: Rope | None  # None: learned positions
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    windows: tuple[int, ...] = ()  # of each layer, 0: none; or of no layer
    rotated: int | None = None  # first dimensions of a head that positions rotate; None: all
    without_rope: tuple[int, ...] = ()  # layers that do not rotate

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
        ):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise ConfigError(f"{self.family}: {name} must be from 1 to {MAX_SIZE:,}, got {getattr(self, name)}")
        if self.layers > MAX_LAYERS:
            raise ConfigError(f"{self.family}: at most {MAX_LAYERS:,} layers are built, got {self.layers}")
        if not 1 <= self.max_positions < 2**31:
            raise ConfigError(f"{self.family}: the context must be from 1 to 2^31 - 1 tokens, got {self.max_positions}")
        if not 0 <= self.norm_eps < math.inf:
            raise ConfigError(f"{self.family}: the norms' epsilon must be finite and not negative, got {self.norm_eps}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.family}: {self.heads} query heads do not divide among {self.kv_heads} KV heads")
        if len(self.windows) not in (0, self.layers) or any(window < 0 for window in self.windows):
            raise ConfigError(f"{self.family}: windows are stated for {len(self.windows)} of {self.layers} layers")
        if self.rope is not None and (self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim):
            raise ConfigError(
                f"{self.family}: rotary positions need an even number of a head's {self.head_dim} dimensions, got "
                f"{self.rotary_dim}"
            )
        if self.rope is not None and self.rope.divisors and len(self.rope.divisors) != self.rotary_dim // 2:
            raise ConfigError(
                f"{self.family}: RoPE has {len(self.rope.divisors)} divisors for {self.rotary_dim // 2} frequencies"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that positions rotate."""
        return self.head_dim if self.rotated is None else self.rotated

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What the cache must keep for this model, layer by layer."""
        windows = self.windows or (0,) * self.layers
        retentions = (Window(window) if window else Full() for window in windows)
        return tuple(key_value(self.kv_heads, self.head_dim, retention) for retention in retentions)


INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout attn_pdrop
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length
    max_window_layers     min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


class _Keys:
    """Hands out a config's keys one by one, with their types checked, and refuses what nobody asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = dict(raw)
        self.where = where

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of `name` as `kind`; null counts as absent. Raises `ConfigError` when absent without default."""
        value = self._raw.pop(name, None)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.where}: the key {name!r} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {name} should be of type {kind.__name__}, got {value!r}")
        return value

    def stated(self, names: Iterable[str]) -> None:
        """Raises `ConfigError` unless each of `names` stands in the config, be it as null."""
        for name in names:
            if name not in self._raw:
                raise ConfigError(f"{self.where}: the key {name!r} is missing")

    def require(self, name: str, expected: Any) -> None:
        """The key may be absent or null; any other value than `expected` changes the maths and is refused."""
        value = self._raw.pop(name, None)
        if value is not None and value != expected:
            raise ConfigError(
                f"{self.where}: {name}={value!r} changes the maths and is not supported ({expected!r} is)"
            )

    def finish(self) -> None:
        """Refuse every key that was not taken and is not known to be inert."""
        unknown = sorted(set(self._raw) - INERT)
        if unknown:
            raise ConfigError(
                f"{self.where}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}, which "
                "may change the maths; remove from config.json what is known to be harmless"
            )


_ACTIVATIONS = {
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


def _activation(keys: _Keys, name: str, default: str, allowed: set[Activation]) -> Activation:
    value = keys.take(name, str, default)
    activation = _ACTIVATIONS.get(value)
    if activation not in allowed:
        known = ", ".join(name for name, kind in _ACTIVATIONS.items() if kind in allowed)
        raise ConfigError(f"{keys.where}: {name}={value!r} is not supported ({known})")
    return activation


def _rope(keys: _Keys, default_theta: float) -> tuple[Rope, float]:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before it); and which part of a head is
    rotated."""
    theta = keys.take("rope_theta", float, default_theta)
    scaling, given = keys.take("rope_scaling", dict, {}), keys.take("rope_parameters", dict, {})
    if scaling and given:
        raise ConfigError(f"{keys.where}: rope_scaling and rope_parameters both stand there; one of them must go")
    parameters = _Keys(given or scaling, f"{keys.where}: rope parameters")
    legacy = parameters.take("type", str, "default")
    kind = parameters.take("rope_type", str, legacy)
    theta = parameters.take("rope_theta", float, theta)
    share = parameters.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float, 1.0))
    rope = Rope(theta)
    if kind == "linear":
        rope = Rope(theta, linear_factor=parameters.take("factor", float))
    elif kind == "llama3":
        rope = Rope(
            theta,
            llama3=Llama3Scaling(
                parameters.take("factor", float),
                parameters.take("low_freq_factor", float),
                parameters.take("high_freq_factor", float),
                parameters.take("original_max_position_embeddings", int),
            ),
        )
    elif kind == "divided":
        divisors = parameters.take("divisors", list)
        if not all(type(number) is float for number in divisors):
            raise ConfigError(f"{keys.where}: RoPE divisors should be a list of numbers")
        rope = Rope(theta, divisors=tuple(divisors))
    elif kind != "default":
        raise ConfigError(f"{keys.where}: RoPE scaling {kind!r} is not supported (default, linear, llama3 are)")
    parameters.finish()
    return rope, share


def _gpt2(keys: _Keys) -> ModelConfig:
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
        activation=_activation(keys, "activation_function", "gelu_new", {Activation.GELU, Activation.GELU_TANH}),
        rope=None,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=keys.take("tie_word_embeddings", bool, True),
    )


# Where a family's defaults are not Llama's, these keys must be stated rather than guessed.
_STATED = {
    "llama": (),
    "mistral": ("max_position_embeddings", "num_key_value_heads", "sliding_window"),
    "qwen2": ("max_position_embeddings", "num_key_value_heads"),
    "qwen3": ("max_position_embeddings", "num_key_value_heads"),
    "phi3": ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps"),
    "smollm3": ("max_position_embeddings", "num_key_value_heads"),
}


def _llama_like(keys: _Keys, family: str) -> ModelConfig:
    """Llama, Mistral, Qwen2, Qwen3, Phi-3 and SmolLM3: one decoder, told apart by biases, the norm on q and k, what is
    rotated, names, and defaults."""
    keys.stated(_STATED[family])
    hidden = keys.take("hidden_size", int)
    heads = keys.take("num_attention_heads", int)
    if heads < 1:
        raise ConfigError(f"{keys.where}: num_attention_heads must be at least 1, got {heads}")
    fixed = {"qwen2": (True, False), "mistral": (False, False), "phi3": (False, False)}
    qkv_bias, out_bias = fixed.get(family, (None, None))
    if qkv_bias is None or out_bias is None:
        qkv_bias = out_bias = keys.take("attention_bias", bool, False)
    positions = keys.take("max_position_embeddings", int, 2048)
    keys.require("pretraining_tp", 1)
    keys.require("rope_interleaved", False)
    keys.require("use_mrope", False)
    layers = keys.take("num_hidden_layers", int)
    head_dim = keys.take("head_dim", int, 128 if family == "qwen3" else hidden // heads)
    rope, share = _rope(keys, 2_000_000.0 if family == "smollm3" else 10_000.0)
    if share != 1 and family != "phi3":
        raise ConfigError(f"{keys.where}: partial_rotary_factor={share} is not supported in a {family} model")
    if family == "phi3":
        keys.take("original_max_position_embeddings", int, positions)  # says something of scaled RoPE alone
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
        activation=_activation(keys, "hidden_act", "silu", {Activation.SILU}),
        rope=rope,
        rotated=None if share == 1 else int(head_dim * share),
        without_rope=_without_rope(keys, layers) if family == "smollm3" else (),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=keys.take("mlp_bias", bool, False) if family in ("llama", "smollm3") else False,
        qk_norm=family == "qwen3",
        tied=keys.take("tie_word_embeddings", bool, family == "smollm3"),
        windows=_windows(keys, family, positions, layers),
    )


def _without_rope(keys: _Keys, layers: int) -> tuple[int, ...]:
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
        raise ConfigError(f"{keys.where}: no_rope_layers marks each of {layers} layers with 0 or 1, got {marks!r:.80}")
    return tuple(layer for layer in range(layers) if not marks[layer])


def _windows(keys: _Keys, family: str, positions: int, layers: int) -> tuple[int, ...]:
    """The window of each layer. One that is at least as long as the context is none. Only Qwen's configs have a switch
    for it, off by default, and a number of first layers without."""
    window = keys.take("sliding_window", int, None)
    in_use, first = True, 0
    if family in ("qwen2", "qwen3", "smollm3"):
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
            raise ConfigError(f"{keys.where}: layer type {kind!r} is not supported ({', '.join(known)} are)")
    if len(kinds) != layers:
        raise ConfigError(f"{keys.where}: layer_types names {len(kinds)} layers of {layers}")
    return tuple(known[kind] for kind in kinds) if window else ()


_READERS: dict[str, Callable[[_Keys], ModelConfig]] = {
    "gpt2": _gpt2,
    "llama": lambda keys: _llama_like(keys, "llama"),
    "mistral": lambda keys: _llama_like(keys, "mistral"),
    "qwen2": lambda keys: _llama_like(keys, "qwen2"),
    "qwen3": lambda keys: _llama_like(keys, "qwen3"),
    "phi3": lambda keys: _llama_like(keys, "phi3"),
    "smollm3": lambda keys: _llama_like(keys, "smollm3"),
}


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The config of a checkpoint. `raw`: the parsed `config.json`; `where`: its path, for messages.

    Raises `ConfigError` for an unknown architecture, a missing or ill-typed key, and any key or value that would
    change the mathematics in a way that is not implemented.
    """
    keys = _Keys(raw, where)
    family = keys.take("model_type", str)
    reader = _READERS.get(family)
    if reader is None:
        raise ConfigError(f"{where}: architecture {family!r} is not supported ({', '.join(_READERS)} are)")
    config = reader(keys)
    keys.finish()
    return config
