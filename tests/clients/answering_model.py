"""A tiny model with room for agents' instructions, whose answers hang on the prompt, are letters, and end.

A random model of the usual kind would read 50,000 tokens for minutes, say nothing that can be seen, and never stop."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.weights.checkpoint import save
from tiny_model import write_tiny_model

VOWELS = "aeiou"
_STEPS = 3  # tokens of an answer: each is of a kind of its own, and the last one holds the vowel that ends it
_LOUD = 40.0  # of what leads from kind to kind, above what the prompt adds


def write_answering_model(directory: Path, context: int) -> Path:
    """The vocabulary and the template of the tiny model, over one layer that looks 512 tokens back."""
    write_tiny_model(directory, context)
    config = json.loads((directory / "config.json").read_text()) | {
        "model_type": "phi3",
        "num_hidden_layers": 1,
        "sliding_window": 512,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": context,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"stop_strings": list(VOWELS), "top_k": 1}))
    model = randomize(build(read_config(config, "config.json"), PlainActivations(), torch.float32), seed=1, std=0.2)
    weights = dict(export(model))
    _answer_in_steps(weights, Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab())
    save(directory / "model.safetensors", weights)
    return directory


def _answer_in_steps(weights: dict[str, Tensor], vocab: dict[str, int]) -> None:
    """The first features say which kind comes next, and no layer touches them; the others choose the token."""
    texts = sorted(text for text in vocab if text.isascii() and text.isalpha() and text.islower())
    begun = [text for text in texts if text[0] not in VOWELS]
    quiet = [text for text in begun if not set(text) & set(VOWELS)]
    kinds = [quiet[::2], quiet[1::2], [text for text in begun if set(text) & set(VOWELS)]]
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[:_STEPS] = 0
            weight[_STEPS:] *= 5
        elif name.endswith("layernorm.weight"):
            weight[:_STEPS] = 0
            weight[_STEPS:] = 1
    weights["model.norm.weight"][:] = 1
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    leads = torch.eye(_STEPS)
    embeddings[:, :_STEPS] = leads[0]
    spoken = torch.zeros(len(head), 1)
    for step, kind in enumerate(kinds):
        ids = [vocab[text] for text in kind]
        spoken[ids] = 1
        head[ids, :_STEPS] = leads[step] * _LOUD
        embeddings[ids, :_STEPS] = leads[(step + 1) % _STEPS]
    head *= spoken
