"""A checkpoint's `config.json`, read key by key.

A key that nobody asks for may change the mathematics, so it is refused by name; keys known to change nothing at
inference stand in `INERT`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kvist.base.errors import ConfigError
from kvist.models.config import Activation, Llama3Scaling, Rope, Yarn

INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout attn_pdrop
    auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    classifier_dropout cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id
    length_penalty max_length max_window_layers min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token_id
    prefix problem_type pruned_heads remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop
    return_dict return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)


class Keys:
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

    def peek(self, name: str) -> Any:
        """The value of `name` as it stands there, or None."""
        return self._raw.get(name)

    def null_or(self, name: str, kind: type, default: Any) -> Any:
        """As `take`, but null is a value of its own, None, and not the same as absent."""
        return self.take(name, kind, None if name in self._raw else default)

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


def read_activation(keys: Keys, name: str, default: str, allowed: set[Activation]) -> Activation:
    value = keys.take(name, str, default)
    activation = _ACTIVATIONS.get(value)
    if activation not in allowed:
        known = ", ".join(name for name, kind in _ACTIVATIONS.items() if kind in allowed)
        raise ConfigError(f"{keys.where}: {name}={value!r} is not supported ({known})")
    return activation


def yarn_scale(factor: float, weight: float) -> float:
    """How much attention grows with the context (arXiv 2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(parameters: Keys) -> Yarn:
    factor = parameters.take("factor", float)
    if not 0 < factor < math.inf:
        raise ConfigError(f"{parameters.where}: factor must be positive and finite, got {factor}")
    one, all_dims = parameters.take("mscale", float, 0.0), parameters.take("mscale_all_dim", float, 0.0)
    both = yarn_scale(factor, one) / yarn_scale(factor, all_dims) if one and all_dims else yarn_scale(factor, 1.0)
    parameters.require("truncate", True)
    return Yarn(
        factor,
        parameters.take("original_max_position_embeddings", int),
        parameters.take("beta_fast", float, 32.0),
        parameters.take("beta_slow", float, 1.0),
        parameters.take("attention_factor", float, both),
    )


def _numbers(parameters: Keys, name: str) -> tuple[float, ...]:
    found = parameters.take(name, list)
    if not found or not all(type(number) in (int, float) for number in found):
        raise ConfigError(f"{parameters.where}: {name} should be a list of numbers, got {found!r:.80}")
    return tuple(float(number) for number in found)


def longrope_scale(factor: float, original: int) -> float:
    """How much attention grows where a context of `original` tokens is `factor` times as long (arXiv 2402.13753,
    section 3.2)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _longrope(keys: Keys, parameters: Keys, theta: float, positions: int) -> Rope:
    """Two divisors for each frequency, short and long. The long ones are used where the model's context is longer than
    the one that it was first trained on, whatever the length of a text: transformers changes from short to long within
    a text, and the keys that it has cached until then stay as they were turned."""
    inner = parameters.take("original_max_position_embeddings", int, positions)
    original = keys.take("original_max_position_embeddings", int, inner)
    if not 1 <= original < 2**31:
        raise ConfigError(f"{parameters.where}: original_max_position_embeddings must be at least 1, got {original}")
    short, long = _numbers(parameters, "short_factor"), _numbers(parameters, "long_factor")
    factor = parameters.take("factor", float, positions / original)
    scale = parameters.take("attention_factor", float, longrope_scale(factor, original))
    return Rope(theta, divisors=long if positions > original else short, scale=scale)


def read_rope(
    keys: Keys, default_theta: float, default_share: float = 1.0, positions: int | None = None
) -> tuple[Rope, float]:
    """`rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before it); and which part of a head is
    rotated. `positions`: the model's context in tokens, of families that may have longrope."""
    theta = keys.take("rope_theta", float, default_theta)
    scaling, given = keys.take("rope_scaling", dict, {}), keys.take("rope_parameters", dict, {})
    if scaling and given:
        raise ConfigError(f"{keys.where}: rope_scaling and rope_parameters both stand there; one of them must go")
    parameters = Keys(given or scaling, f"{keys.where}: rope parameters")
    legacy = parameters.take("type", str, "default")
    kind = parameters.take("rope_type", str, legacy)
    theta = parameters.take("rope_theta", float, theta)
    share = parameters.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float, default_share))
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
        rope = Rope(theta, divisors=_numbers(parameters, "divisors"))
    elif kind in ("longrope", "su") and positions is not None:
        rope = _longrope(keys, parameters, theta, positions)
    elif kind == "yarn":
        rope = Rope(theta, yarn=_yarn(parameters))
    elif kind == "proportional":
        rope, share = Rope(theta, linear_factor=parameters.take("factor", float, 1.0), turning=share), 1.0
    elif kind != "default":
        known = f"default, linear, llama3, yarn, {'proportional' if positions is None else 'proportional, longrope'}"
        raise ConfigError(f"{keys.where}: RoPE scaling {kind!r} is not supported ({known} are)")
    parameters.finish()
    return rope, share
