"""Hostile and absurd metadata of GGUF files: each ends soon, in a model or in one short line."""

import random
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Type
from tokenizers import pre_tokenizers

from kvist.base.errors import KvistError
from kvist.service.gguf import open_gguf
from kvist.service.sampling import read_proposed
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import TOKENIZER, Tokenizer

INPUTS = 250
SECONDS = 10  # of this process, whatever others do
LENGTH = 400
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
HOSTILE: list[tuple[Any, Type]] = [
    *[(number, Type.INT64) for number in (0, 1, -1, 7, 2**31, 2**62, -(2**63))],
    (2**64 - 1, Type.UINT64),
    *[(number, Type.FLOAT64) for number in (0.0, -1.0, 1e308, float("nan"), float("inf"), 1e-320)],
    (True, Type.BOOL),
    *[(text, Type.STRING) for text in ("", "x" * 200_000, "a\nb" * 300, "\u2581" * 5000, "{% for %}", "none", "yarn")],
    *[(items, Type.ARRAY) for items in ([0], [-1, 2**31 - 1], [1.5], ["a"], ["a", "a"], ["x" * 200_000], ["y"] * 3000)],
    (list(range(70_000)), Type.ARRAY),
    ([str(number) for number in range(5000)], Type.ARRAY),
]


def metadata_of(kind: str) -> dict[str, tuple[Any, Type]]:
    tokens = ["<unk>", "<s>", "</s>", *ALPHABET] if kind == "gpt2" else ["<unk>", "<s>", "</s>", "a", "b", "ab", "abab"]
    facts: dict[str, tuple[Any, Type]] = {
        f"llama.{key}": (value, Type.UINT32)
        for key, value in {
            "block_count": 1,
            "context_length": 64,
            "embedding_length": 32,
            "feed_forward_length": 32,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "rope.dimension_count": 16,
            "attention.key_length": 16,
            "attention.sliding_window": 0,
            "rope.scaling.original_context_length": 32,
        }.items()
    }
    numbers = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4, "rope.scaling.factor": 2.0}
    facts |= {f"llama.{key}": (value, Type.FLOAT32) for key, value in numbers.items()}
    facts |= {
        "llama.rope.scaling.type": ("yarn", Type.STRING),
        "tokenizer.ggml.model": (kind, Type.STRING),
        "tokenizer.ggml.pre": ("llama-bpe", Type.STRING),
        "tokenizer.ggml.tokens": (tokens, Type.ARRAY),
        "tokenizer.ggml.token_type": ([2, 3, 3, *[1] * (len(tokens) - 3)], Type.ARRAY),
        "tokenizer.ggml.scores": ([-float(index) for index in range(len(tokens))], Type.ARRAY),
        "tokenizer.ggml.merges": (["a b"] if kind == "gemma4" else [], Type.ARRAY),
        "tokenizer.ggml.bos_token_id": (1, Type.UINT32),
        "tokenizer.ggml.eos_token_id": (2, Type.UINT32),
        "tokenizer.ggml.unknown_token_id": (0, Type.UINT32),
        "tokenizer.ggml.add_bos_token": (True, Type.BOOL),
        "tokenizer.chat_template": ("{{ messages[0].content }}", Type.STRING),
        "tokenizer.chat_templates": (["tool_use"], Type.ARRAY),
        "tokenizer.chat_template.tool_use": ("tools", Type.STRING),
        "general.sampling.temp": (0.5, Type.FLOAT32),
        "general.sampling.top_k": (40, Type.INT32),
        "general.name": ("Phi-3", Type.STRING),
        "split.count": (1, Type.UINT16),
        "split.no": (0, Type.UINT16),
    }
    return facts


def write(path: Path, facts: dict[str, tuple[Any, Type]], width: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind) in facts.items():
        if value != []:  # which the package does not write
            writer.add_key_value(key, value, kind)
    shapes = {"token_embd": (262, width), "output_norm": (width,), "blk.0.attn_norm": (width,)}
    shapes |= {"blk.0.ffn_norm": (width,), "blk.0.attn_q": (32, width), "blk.0.attn_k": (16, width)}
    shapes |= {"blk.0.attn_v": (16, width), "blk.0.attn_output": (width, 32), "blk.0.ffn_gate": (32, width)}
    shapes |= {"blk.0.ffn_up": (32, width), "blk.0.ffn_down": (width, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def outcome(path: Path) -> str:
    """What became of one file: "opened", or its refusal."""
    began = time.process_time()
    try:
        model = open_gguf(path)
        if (model.directory / TOKENIZER).is_file():
            Tokenizer.load(model.directory).encode("ab a")
        read_proposed(model.directory)
        ChatTemplate.load(model.directory)
        found = "opened"
    except KvistError as error:
        found = str(error)
    assert time.process_time() - began < SECONDS
    assert "\n" not in found
    assert len(found) <= LENGTH, found
    return found


def fuzz(folder: Path, inputs: int, seed: int) -> list[str]:
    generator, found = random.Random(seed), []
    for number in range(inputs):
        facts = metadata_of(generator.choice(["gpt2", "llama", "gemma4"]))
        for _ in range(generator.choice([1, 1, 1, 2])):
            key = generator.choice([*facts, "llama.unheard.of", "llama." + "k" * 3000])
            if generator.random() < 0.1:
                facts.pop(key, None)
            else:
                facts[key] = generator.choice(HOSTILE)
        found.append(outcome(write(folder / f"{number}.gguf", facts, 32)))
        (folder / f"{number}.gguf").unlink()
    return found


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.service.gguf.cache_folder", lambda: tmp_path / "cache")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_files_are_whole_before_they_are_spoiled(kind: str, tmp_path: Path) -> None:
    assert outcome(write(tmp_path / "x.gguf", metadata_of(kind), 32)) == "opened"


def test_hostile_metadata(tmp_path: Path) -> None:
    found = fuzz(tmp_path, INPUTS, seed=7)
    assert 0 < found.count("opened") < INPUTS / 2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma4"])
def test_a_token_of_a_novels_length(kind: str, tmp_path: Path) -> None:
    """Where merges are found by cutting tokens, that would take minutes."""
    facts = metadata_of(kind)
    tokens = facts["tokenizer.ggml.tokens"][0]
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 100_000], Type.ARRAY)
    assert "a token has at most 1,024 characters" in outcome(write(tmp_path / "x.gguf", facts, 32))
    facts["tokenizer.ggml.tokens"] = ([*tokens[:-1], "ab" * 512], Type.ARRAY)
    assert outcome(write(tmp_path / "y.gguf", facts, 32)) == "opened"
