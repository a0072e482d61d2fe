"""The random models of `bench.models` as GGUF files, from the same numbers, for engines that read those."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from kvist.base.files import atomic_file
from kvist.bench.models import CONTEXT, random_model
from kvist.bench.shapes import shape_named
from kvist.models.gguf import file_name
from kvist.service.loaded import Loaded
from kvist.weights.checkpoint import Checkpoint

KINDS = {"int8": Kind.Q8_0, "int4": Kind.Q4_0, "bf16": Kind.BF16}  # of GGUF, with as many bits


def random_gguf(name: str, weights: str) -> Path:
    """The GGUF file of shape `name` with weights of that many bits, beside the random checkpoint; made there first
    where it is missing."""
    loaded = random_model(name, "bf16")
    path = loaded.directory / f"{name}-{KINDS[weights].name}.gguf"
    if not path.exists():
        with atomic_file(path) as target:
            _write(target, loaded, name, KINDS[weights])
    return path


def _write(path: Path, loaded: Loaded, name: str, kind: Kind) -> None:
    shape, config = shape_named(name), loaded.config
    family = "qwen2" if shape.qkv_bias else "llama"
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(shape.vocab)])
    writer.add_token_types([1] * shape.vocab)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    checkpoint = Checkpoint(loaded.directory)
    for theirs, tensor in checkpoint.stream(checkpoint.names()):
        numbers, (where, order) = tensor.float().numpy(), file_name(family, theirs, config)
        if order is not None:  # in the order in which they are read back
            numbers = numbers[np.argsort(order)]
        numbers = np.ascontiguousarray(numbers)
        if numbers.ndim == 1:
            writer.add_tensor(where, numbers)
        else:
            writer.add_tensor(where, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
