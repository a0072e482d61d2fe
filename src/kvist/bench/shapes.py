"""Shapes of known models, by name: what a benchmark needs to build random weights of the same size."""

from dataclasses import dataclass

from kvist.base.errors import ConfigError
from kvist.cache.spec import LayerSpec, Reading, key_value, latent, tied


@dataclass(frozen=True)
class Shape:
    """The sizes of a llama-like decoder. `tied`: the head is the embedding. `qkv_bias`: q, k and v have biases."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False


SHAPES = (
    Shape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    Shape("qwen2.5-0.5b", 24, 896, 4864, 14, 2, 64, 151936, tied=True, qkv_bias=True),
    Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    Shape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, tied=False),
)


def shape_named(name: str) -> Shape:
    """Raises `ConfigError` that lists the known names."""
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ConfigError(f"there is no shape {name!r}; choose one of {', '.join(shape.name for shape in SHAPES)}")


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of one layer's attention: its query heads, and what the cache keeps for it."""

    name: str
    heads: int
    spec: LayerSpec

    @property
    def kv_heads(self) -> int:
        return self.spec.streams[-1].heads

    @property
    def value_dim(self) -> int:
        return self.spec.streams[-1].dim

    @property
    def key_dim(self) -> int:
        """Of queries, too."""
        first = self.spec.streams[0].dim
        return first + self.value_dim if self.spec.reading is Reading.JOINED else first


ATTENTION_SHAPES = (
    *(AttentionShape(shape.name, shape.heads, key_value(shape.kv_heads, shape.head_dim)) for shape in SHAPES),
    AttentionShape("gemma-4-e2b", 8, key_value(1, 512)),  # layers without a window, here and below
    AttentionShape("gemma-4-26b-a4b", 16, tied(2, 512)),
    AttentionShape("deepseek-v2-lite", 16, latent(512, 64)),
)


def attention_shape_named(name: str) -> AttentionShape:
    """Raises `ConfigError` that lists the known names."""
    for shape in ATTENTION_SHAPES:
        if shape.name == name:
            return shape
    known = ", ".join(shape.name for shape in ATTENTION_SHAPES)
    raise ConfigError(f"there is no shape {name!r}; choose one of {known}")
