"""Models with random weights in standard shapes: made once, kept in the cache folder as ordinary checkpoints, with a
vocabulary made up for them."""

import json
from pathlib import Path

import torch

from kvist.base.files import atomic_folder, writable_cache_folder
from kvist.bench.shapes import Shape, shape_named
from kvist.bench.vocabulary import write_tokenizer
from kvist.models.families import read_config
from kvist.models.load import DTYPES, build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.service.loaded import Loaded, open_model
from kvist.weights.checkpoint import SINGLE_FILE, save

SEED = 0
CONTEXT = 131_072
# nanoGPT's architecture at 0.2 million parameters.
NANOGPT = {
    "model_type": "gpt2",
    "vocab_size": 65,
    "n_embd": 64,
    "n_inner": 256,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 4096,
    "activation_function": "gelu",
}


def random_model(name: str, dtype: str, kv: str | None = None, weights: str | None = None) -> Loaded:
    """The model of shape `name`, in `dtype` or packed as `weights` says, from the cache folder, made there first where
    it is missing.

    Raises `ConfigError` listing the shapes when there is none of that name.
    """
    config = NANOGPT if name == "nanogpt-0.2m" else _config(shape_named(name))
    directory = writable_cache_folder() / "shapes" / f"{name}-{dtype}-{SEED}"
    if not (directory / SINGLE_FILE).exists():
        _make(directory, config, DTYPES[dtype])
    if not (directory / "chat_template.jinja").exists() and name != "nanogpt-0.2m":
        write_tokenizer(directory, shape_named(name).vocab)
    return open_model(str(directory), kv=kv, weights=weights)


def _make(directory: Path, config: dict[str, object], dtype: torch.dtype) -> None:
    model = build(read_config(config, "the shape"), PlainActivations(), dtype)
    with atomic_folder(directory) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save(folder / SINGLE_FILE, export(randomize(model, SEED)))


def _config(shape: Shape) -> dict[str, object]:
    """A `config.json` of the shape. Its context is long enough for any benchmark."""
    family = {"model_type": "qwen2"} if shape.qkv_bias else {"model_type": "llama", "attention_bias": False}
    return family | {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
    }
