"""Shapes of known models, by name: what a benchmark needs to build random weights of the same size."""

from dataclasses import dataclass

from kvist.base.errors import ConfigError


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
