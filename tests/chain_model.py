"""A model that writes what it is told: its next token depends on the last one alone, so answers are known."""

import json
from itertools import pairwise
from pathlib import Path

import torch

from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import save_tokenizer, train_bytes_bpe
from kvist.weights.checkpoint import save

EOS = "<|im_end|>"
_SPECIAL = ["<|im_start|>", EOS, "<think>", "</think>"]
_WIDTH = 128


def write_chain_model(directory: Path, template: str, texts: list[str], context: int = 2048) -> Path:
    """`texts`: each is followed through, character by character (a special token counts as one), so no character may
    have two successors among them."""
    directory.mkdir(parents=True)
    tokenizer = train_bytes_bpe("\x01\x01", 257)
    tokenizer.add_special_tokens(_SPECIAL)
    save_tokenizer(tokenizer, directory, eos=EOS)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": _WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template)
    model = build(read_config(config, "config.json"), PlainActivations(), torch.float32)
    tensors = dict(export(randomize(model, seed=1, std=0.1)))
    read = Tokenizer.load(directory)
    embedding = torch.randn(config["vocab_size"], _WIDTH, generator=torch.Generator().manual_seed(1))
    following = torch.zeros_like(embedding)
    for text in texts:
        ids = read.encode(text, add_special=False)
        for token, after in pairwise(ids):
            assert not following[after].any() or torch.equal(following[after], embedding[token]), "two predecessors"
            following[after] = embedding[token]
    for name in tensors:  # what the layers add is nothing
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embedding, following
    tensors["model.norm.weight"] = torch.ones(_WIDTH)
    save(directory / "model.safetensors", tensors)
    return directory
