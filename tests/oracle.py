"""Small random models, and ways to run token sequences through them that need no batch and no engine."""

import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvist.base.events import Listener
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import BF16, FP16, FP32
from kvist.cache.layout import plan_layout
from kvist.cache.manager import Lease
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.decoder import Decoder
from kvist.models.linear import uniform
from kvist.models.load import build, export, load_packed, randomize
from kvist.ops.backend import Backend, select
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.weights.checkpoint import SINGLE_FILE, save

LLAMA = ModelConfig(
    family="llama",
    vocab_size=67,
    hidden_size=48,
    intermediate_size=80,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    max_positions=2048,
    norm_eps=1e-5,
    activation=Activation.SILU,
    rope=Rope(10_000.0),
)
QWEN3 = ModelConfig(
    family="qwen3",
    vocab_size=67,
    hidden_size=64,
    intermediate_size=80,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=48,
    max_positions=2048,
    norm_eps=1e-6,
    activation=Activation.SILU,
    rope=Rope(10_000.0),
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    tied=True,
)
GPT2 = ModelConfig(
    family="gpt2",
    vocab_size=67,
    hidden_size=64,
    intermediate_size=256,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=16,
    max_positions=2048,
    norm_eps=1e-5,
    activation=Activation.GELU_TANH,
    rope=None,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=True,
)

# Configs as checkpoints have them: layers that read one another's caches, with windows and without, whose keys are
# their values; and latents.
_TINY = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
SHARED_AND_TIED = _TINY | {
    "model_type": "gemma4_text",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 67,
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LATENT = _TINY | {
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def make_runner(
    config: ModelConfig = LLAMA,
    dtype: torch.dtype = torch.float32,
    kv: str = "fp32",
    blocks: int = 40,
    backend: str | None = None,
    listener: Listener | None = None,
    bits: int | None = None,
) -> Runner:
    """A runner over a model with random weights, large enough for every layer to matter; packed into `bits` bits."""
    full = next(codec for codec in (FP32, BF16, FP16) if codec.dtype == dtype)
    layout = plan_layout(config.layer_specs(), parse_choice(kv), full=full)
    operators = select("cpu", dtype, config.head_dim, layout.block_size, backend)
    model = randomize(build(config, operators, dtype), seed=1, std=0.2)
    if bits is not None:
        model = packed(model, operators, bits)
    return Runner(model, layout, blocks, operators, listener)


def packed(model: Decoder, operators: Backend, bits: int) -> Decoder:
    """The same model, read as one with packed weights."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / SINGLE_FILE, export(model))
        return load_packed(Path(folder), model.config, operators, uniform(bits))


def tokens_of(rng: random.Random, count: int, vocab_size: int = 67) -> list[int]:
    """`count` random token ids."""
    return [rng.randrange(vocab_size) for _ in range(count)]


def cuts(rng: random.Random, total: int, most: int) -> Iterator[int]:
    """Random chunk sizes up to `most` that sum to `total`."""
    while total:
        size = rng.randint(1, min(most, total))
        yield size
        total -= size


def feed(runner: Runner, lease: Lease, tokens: Sequence[int], sizes: Iterable[int] | None = None) -> Tensor:
    """Append `tokens` to `lease` in chunks of `sizes`, else in the widest; all logits `[len(tokens), vocab]`."""
    most = runner.widths.most
    if sizes is None:
        sizes = [min(most, len(tokens) - start) for start in range(0, len(tokens), most)]
    parts, start = [], 0
    for size in sizes:
        parts.append(runner.run([Work(lease, tokens[start : start + size], size)])[0])
        start += size
    assert start == len(tokens)
    return torch.cat(parts)


def fresh(runner: Runner, tokens: Sequence[int]) -> Tensor:
    """All logits `[len(tokens), vocab]` of a run from nothing: what every other way must equal."""
    lease = runner.manager.open()
    try:
        return feed(runner, lease, tokens)
    finally:
        runner.manager.release(lease)
