"""The frozen description of a decoder. Families that have more to say add to it."""

import math
from dataclasses import dataclass
from enum import StrEnum

from kvist.base.errors import ConfigError, brief
from kvist.cache.spec import Full, LayerSpec, Window, key_value

# Far above any model; what is larger is a damaged file, and would be built for hours before memory ran out.
MAX_SIZE = 2**24
MAX_LAYERS = 1024


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
class Yarn:
    """YaRN (arXiv 2309.00071): frequencies that turn more than `beta_fast` times within `original_max_positions` stay,
    those that turn less than `beta_slow` times are divided by `factor`, a ramp between. `scale`: of cos and sin."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    scale: float

    def __post_init__(self) -> None:
        numbers = self.factor, self.beta_fast, self.beta_slow, self.scale
        if not all(0 < number < math.inf for number in numbers) or self.original_max_positions < 1:
            raise ConfigError(f"RoPE: yarn scaling needs positive numbers, got {self}")


@dataclass(frozen=True)
class Rope:
    """Rotary positions over the whole head, halves rotated (arXiv 2104.09864, in Llama's half-split order)."""

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] = ()  # of each frequency, or none
    scale: float = 1.0  # of cos and sin, without yarn
    yarn: Yarn | None = None
    turning: float = 1.0  # share of the frequencies that turn at all, the first ones

    def __post_init__(self) -> None:
        numbers = {"rope_theta": self.theta, "factor": self.linear_factor, "attention_factor": self.scale}
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"RoPE: {name} must be positive and finite, got {value}")
        if not 0 < self.turning <= 1:
            raise ConfigError(f"RoPE: partial_rotary_factor must lie between 0 and 1, got {self.turning}")
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
    head_bias: bool = False
    repeats: int = 1  # times that each layer is run in a row, each time with a cache of its own (MobileLLM)

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
            if not 1 <= (size := getattr(self, name)) <= MAX_SIZE:
                raise ConfigError(f"{self.family}: {name} must be from 1 to {MAX_SIZE:,}, got {brief(size)}")
        if self.layers > MAX_LAYERS:
            raise ConfigError(f"{self.family}: at most {MAX_LAYERS:,} layers are built, got {self.layers}")
        if not 1 <= self.max_positions < 2**31:
            raise ConfigError(
                f"{self.family}: the context must be from 1 to 2^31 - 1 tokens, got {brief(self.max_positions)}"
            )
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

    def naive_numbers(self) -> int:
        """Numbers of a token in a cache that keeps keys and values of every head of every layer."""
        return 2 * self.layers * self.repeats * self.kv_heads * self.head_dim

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        """What the cache must keep for this model, layer by layer."""
        windows = self.windows or (0,) * self.layers * self.repeats
        retentions = (Window(window) if window else Full() for window in windows)
        return tuple(key_value(self.kv_heads, self.head_dim, retention) for retention in retentions)
