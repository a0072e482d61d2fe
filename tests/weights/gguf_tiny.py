"""The smallest whole model in GGUF: metadata to change, key by key, and a file of it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Type
from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


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
