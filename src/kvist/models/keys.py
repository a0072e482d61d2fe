"""A checkpoint's `config.json`, read key by key.

A key that nobody asks for may change the mathematics, so it is refused by name, unless it is known to change nothing;
see `kvist.models.inert`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from kvist.base.errors import ConfigError, brief
from kvist.models.config import Activation, Llama3Scaling, Rope, Yarn
from kvist.models.inert import is_inert

MOST = 2**53  # beyond it a float64 does not hold each whole number, and no config has any
_NAMED = 3  # unknown keys in a message


class Keys:
    """Hands out a config's keys one by one, with their types checked, and refuses what nobody asked for."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw = dict(raw)
        self.where = where

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of `name` as `kind`; null counts as absent. Numbers are finite, whole ones within 2^53. Raises
        `ConfigError` when absent without default."""
        value = self._raw.pop(name, None)
        if value is None:
            if default is ...:
                raise ConfigError(f"{self.where}: the key {name!r} is missing")
            return default
        if type(value) is int and kind in (int, float) and abs(value) > MOST:
            raise ConfigError(f"{self.where}: {name} should be within 2^53, got {brief(value)}")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {name} should be of type {kind.__name__}, got {brief(value)}")
        if kind is float and not math.isfinite(value):
            raise ConfigError(f"{self.where}: {name} must be finite, got {value}")
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
                f"{self.where}: {name}={brief(value)} changes the maths and is not supported ({expected!r} is)"
            )

    def finish(self, family: str = "") -> None:
        """Refuse every key that was not taken and is not known to be inert in a config of this family."""
        if (quantized := self._raw.get("quantization_config") or self._raw.get("compression_config")) is not None:
            how = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ConfigError(
                f"{self.where}: quantization_config says that the weights are quantized ({brief(how)}), which is not "
                "read; take the checkpoint that was quantized, or a GGUF file, and --weights int8 or int4"
            )
        unknown = sorted(name for name, value in self._raw.items() if not is_inert(name, value, family))
        if unknown:
            more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
            raise ConfigError(
                f"{self.where}: unknown key{'s' if len(unknown) > 1 else ''} "
                f"{', '.join(map(brief, unknown[:_NAMED]))}{more}, which may change the maths; remove from config.json "
                "what is known to be harmless"
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
        raise ConfigError(f"{keys.where}: {name}={brief(value)} is not supported ({known})")
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
    if not found or not all(type(number) in (int, float) and abs(number) <= MOST for number in found):
        raise ConfigError(f"{parameters.where}: {name} should be a list of numbers, got {brief(found)}")
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
    if scaling and given and scaling != given:
        raise ConfigError(f"{keys.where}: rope_scaling and rope_parameters both stand there; one of them must go")
    parameters = Keys(given or scaling, f"{keys.where}: rope parameters")
    legacy = parameters.take("type", str, "default")
    kind = parameters.take("rope_type", str, legacy)
    theta = parameters.take("rope_theta", float, theta)
    share = parameters.take("partial_rotary_factor", float, keys.take("partial_rotary_factor", float, default_share))
    if not 0 < share <= 1:
        raise ConfigError(f"{keys.where}: partial_rotary_factor must lie between 0 and 1, got {share}")
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
        raise ConfigError(f"{keys.where}: RoPE scaling {brief(kind)} is not supported ({known} are)")
    parameters.finish()
    return rope, share
