"""What decides a training run, as one frozen value; the `config.json` that follows; and the presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import torch

from kvist.base.errors import KvistError
from kvist.cache.layout import BLOCK_SIZE
from kvist.ops.packing import unsupported


class TrainError(KvistError):
    """A training run that cannot start or cannot go on. The message is one line."""


class Vocabulary(StrEnum):
    CHARACTERS = "characters"  # one token per character of the corpus
    BYTES = "bytes"  # byte-level BPE, trained on the training part of the corpus


class Method(StrEnum):
    ADAMW = "adamw"  # arXiv 1711.05101
    MUON = "muon"  # AdamW, with orthogonalized momentum for the matrices of the blocks


FAMILIES = ("gpt2", "llama", "qwen3")
_MOST_WEIGHTS = 1_000_000_000
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class TrainSettings:
    """One run. Lengths in tokens, `rows` in sequences per step.

    The first `short_share` of the steps use rows of `short_context` tokens, so many that a step has as many
    tokens as later. The learning rate rises over the first `warmup_share` of the steps and then falls along a
    cosine to `final_learning_rate`.
    Raises `TrainError` for values that make no run.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    hidden_size: int
    intermediate_size: int
    context: int
    rows: int
    steps: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_share: float = 0.05
    method: Method = Method.ADAMW
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    dropout: float = 0.0
    short_context: int = 0
    short_share: float = 0.0
    vocabulary: Vocabulary = Vocabulary.CHARACTERS
    vocab_size: int = 512  # byte-level BPE only
    evaluate_every: int = 250
    save_every: int = 250
    seed: int = 1337

    def __post_init__(self) -> None:
        self._check_model()
        self._check_run()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.context

    @property
    def short_steps(self) -> int:
        return int(self.short_share * self.steps)

    def context_at(self, step: int) -> int:
        """The length of the rows of step `step`, counted from 0."""
        return self.short_context if step < self.short_steps else self.context

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        warmup = int(self.warmup_share * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        done = (step - warmup) / (self.steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)

    def _check_model(self) -> None:
        if self.family not in FAMILIES:
            raise TrainError(f"the family {self.family!r} cannot be trained ({', '.join(FAMILIES)} can)")
        for name in ("layers", "heads", "kv_heads", "hidden_size", "intermediate_size", "context"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.heads:
            raise TrainError(f"hidden_size {self.hidden_size} does not divide among {self.heads} heads")
        if self.heads % self.kv_heads:
            raise TrainError(f"{self.heads} heads do not divide among {self.kv_heads} KV heads")
        if reason := unsupported(torch.float32, self.head_dim, BLOCK_SIZE):
            raise TrainError(f"hidden_size {self.hidden_size} over {self.heads} heads: {reason}")
        if self.family == "gpt2" and self.kv_heads != self.heads:
            raise TrainError(f"GPT-2 has a KV head for each of its {self.heads} heads, not {self.kv_heads}")
        weights = self.layers * self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)
        if weights > _MOST_WEIGHTS:
            raise TrainError(f"about {weights:,} weights are too many to train here; {_MOST_WEIGHTS:,} are the most")
        if self.vocabulary is Vocabulary.BYTES and not 257 <= self.vocab_size <= 65536:
            raise TrainError(f"a byte-level vocabulary has 257 to 65,536 tokens, got {self.vocab_size:,}")

    def _check_run(self) -> None:
        for name in ("rows", "steps", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens_per_step > _MOST_TOKENS:
            raise TrainError(
                f"{self.rows:,} rows of {self.context:,} tokens are too much for one step; "
                f"{_MOST_TOKENS:,} tokens are the most"
            )
        if not 0 < self.learning_rate < 1 or not 0 <= self.final_learning_rate <= self.learning_rate:
            raise TrainError(
                "the learning rate must be between 0 and 1 and fall, got "
                f"{self.learning_rate:g} falling to {self.final_learning_rate:g}"
            )
        for name in ("beta1", "beta2", "dropout", "weight_decay", "warmup_share", "short_share"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"{name} must be at least 0 and below 1, got {getattr(self, name):g}")
        if not self.gradient_clip > 0:
            raise TrainError(f"gradient_clip must be above 0, got {self.gradient_clip:g}")
        if self.short_share and (self.short_context < 1 or self.context % self.short_context):
            raise TrainError(f"short_context {self.short_context} must divide the context of {self.context}")
        if not 0 <= self.seed < 2**31:
            raise TrainError(f"a seed is a number from 0 to 2^31 - 1, got {self.seed}")

    def config_json(self, vocab_size: int) -> dict[str, Any]:
        """The `config.json` of the model that is trained, with the keys of its Hugging Face family."""
        if self.family == "gpt2":
            return self._gpt2_json(vocab_size)
        architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.family]
        return {
            "architectures": [architecture],
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "torch_dtype": "float32",
        }

    def _gpt2_json(self, vocab_size: int) -> dict[str, Any]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.layers,
            "n_head": self.heads,
            "vocab_size": vocab_size,
            "n_positions": self.context,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu",
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "torch_dtype": "float32",
        }


PRESETS: Mapping[str, TrainSettings] = MappingProxyType(
    {
        # nanoGPT's recipe for a CPU (its README, "i only have a macbook"), with GPT-2's biases.
        "nanogpt": TrainSettings(
            family="gpt2",
            layers=4,
            heads=4,
            kv_heads=4,
            hidden_size=128,
            intermediate_size=512,
            context=64,
            rows=12,
            steps=2000,
            learning_rate=1e-3,
            final_learning_rate=1e-4,
        ),
        # As many tokens, spent better: rotary positions, normed q and k, Muon, longer rows.
        "default": TrainSettings(
            family="qwen3",
            layers=4,
            heads=4,
            kv_heads=4,
            hidden_size=128,
            intermediate_size=512,
            context=256,
            rows=3,
            steps=2000,
            learning_rate=4e-3,
            method=Method.MUON,
        ),
        # The model that comes with the package.
        "bundled": TrainSettings(
            family="qwen3",
            layers=4,
            heads=4,
            kv_heads=2,
            hidden_size=256,
            intermediate_size=352,
            context=1024,
            rows=2,
            steps=2400,
            learning_rate=4e-3,
            warmup_share=0.021,
            method=Method.MUON,
            dropout=0.1,
            short_context=256,
            short_share=0.75,
            evaluate_every=200,
            save_every=100,
        ),
    }
)
