"""GGUF files of further families, as llama.cpp's converter writes them: the same models as from safetensors."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import ARCHITECTURES, write_family
from gguf_newer_files import WRITERS, write_deepseek2, write_gemma4
from safetensors.torch import load_file

from kvist.base.errors import ConfigError, KvistError
from kvist.models.families import read_config
from kvist.models.gguf import config_of, parts_of
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.runtime.batch import Work
from kvist.service.loaded import Loaded, open_model
from kvist.weights.checkpoint import SINGLE_FILE, save
from kvist.weights.gguf_header import GgufHeader, read_header
from oracle import tokens_of

VOCAB = 96
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}
RMS = BASE | {"rms_norm_eps": 1e-5}
LAYER = BASE | {"layer_norm_eps": 1e-5}
PARTLY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}
GEMMA = RMS | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 20, "tie_word_embeddings": True}
BOTH = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.125, 1.25, 1.5, 1.75, 2.0, 2.25, 3.0],
    "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0],
}
GEMMA4 = GEMMA | {
    "model_type": "gemma4_text",
    "global_head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 50_000.0, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    },
}
del GEMMA4["query_pre_attn_scalar"]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
DEEPSEEK = RMS | {
    "model_type": "deepseek_v2",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | CAPS,
    "gemma3_text": GEMMA | {"rope_parameters": BOTH, "num_hidden_layers": 7},
    "phi3": RMS | PARTLY | {"sliding_window": 30},
    "smollm3": RMS,
    "qwen3_moe": RMS | EXPERTS | {"head_dim": 32},
    "phi": LAYER | PARTLY,
    "gpt_neox": LAYER | PARTLY | {"attention_bias": True, "use_parallel_residual": True},
    "phi3-long": RMS | {"original_max_position_embeddings": 64, "rope_parameters": LONG},
    "phi3-short": RMS | {"original_max_position_embeddings": 256, "rope_parameters": LONG},
    "gemma4-small": GEMMA4
    | {
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCAB,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 4.0,
    },
    "gemma4-large": GEMMA4
    | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 32},
    "deepseek": DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek-large": DEEPSEEK
    | {"q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}
    | {"routed_scaling_factor": 1.5, "attention_bias": True, "rope_parameters": YARN},
    "stablelm": LAYER | PARTLY | {"use_qkv_bias": True, "use_parallel_residual": False},
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.writable_cache_folder", lambda: tmp_path / "cache")


def both(folder: Path, case: str, kind: Kind) -> tuple[Path, Path]:
    """A directory with safetensors and a GGUF file of the same random weights, norms included."""
    config = {"model_type": case.partition("-")[0]} | CONFIGS[case]
    if case == "gpt_neox":
        del config["num_key_value_heads"]
    model = randomize(build(read_config(config, "test"), PlainActivations(), torch.float32), seed=3, std=0.2)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: tensor + 0.3 * torch.empty(tensor.shape).normal_(generator=generator) if "norm" in name else tensor
        for name, tensor in export(model).items()
    }
    for name in tensors if config["model_type"] == "gemma4_text" else ():
        if name.endswith("q_norm.weight"):  # there is no other scale of q.k
            tensors[name] *= 0.2
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    save(folder / "hf" / SINGLE_FILE, tensors)
    stored, write = load_file(folder / "hf" / SINGLE_FILE), WRITERS.get(config["model_type"], write_family)
    return folder / "hf", write(folder / "model.gguf", stored, config, kind)


def logits(loaded: Loaded) -> torch.Tensor:
    runner = loaded.engine(loaded.room(100)).runner
    return runner.run([Work(runner.manager.open(), tokens_of(random.Random(0), 90, VOCAB), 90)])[0]


def test_every_architecture_is_here() -> None:
    families = {CONFIGS[case].get("model_type", case.partition("-")[0]) for case in CONFIGS}
    assert families == {*ARCHITECTURES, *WRITERS}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_model_in_both_forms(family: str, tmp_path: Path) -> None:
    directory, file = both(tmp_path, family, Kind.F32)
    theirs, ours = open_model(str(directory)), open_model(str(file))
    assert ours.config == theirs.config
    for name, weight in theirs.model.named_parameters():
        assert torch.allclose(dict(ours.model.named_parameters())[name], weight, rtol=0, atol=1e-6), name
    # Gemma's norms are stored with one added, which rounds.
    torch.testing.assert_close(
        logits(ours), logits(theirs), rtol=0, atol=2e-4 if family in ("gemma2", "gemma3_text") else 0
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_quantized(family: str, tmp_path: Path) -> None:
    _, file = both(tmp_path, family, Kind.Q8_0)
    loaded, plain = open_model(str(file)), open_model(str(file), weights="fp32")
    assert loaded.model.is_packed
    assert not plain.model.is_packed
    ours, theirs = logits(loaded), logits(plain)
    rows = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert float(rows.median()) < 0.2, "activations are rounded to 8 bits, and random layers make that larger"


def test_keys_and_values_of_a_head_in_one_matrix(tmp_path: Path) -> None:
    """As files of DeepSeek-V2 were before attention took the latents as they are."""
    directory, file = both(tmp_path, "deepseek-large", Kind.F32)
    config = json.loads((directory / "config.json").read_text())
    older = write_deepseek2(tmp_path / "older.gguf", load_file(directory / SINGLE_FILE), config, Kind.F32, older=True)
    assert "blk.0.attn_kv_b.weight" in read_header(older).tensors
    assert open_model(str(older)).config == open_model(str(file)).config
    assert torch.equal(logits(open_model(str(older))), logits(open_model(str(file))))


def test_keys_and_values_that_are_not_used(tmp_path: Path) -> None:
    """Published checkpoints of Gemma 4 have them for the layers that read another's."""
    directory, _ = both(tmp_path, "gemma4-small", Kind.F32)
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / SINGLE_FILE)
    more = {name.replace("layers.0", "layers.2"): tensor for name, tensor in tensors.items() if "layers.0" in name}
    file = write_gemma4(tmp_path / "more.gguf", more | tensors, config, Kind.F32)
    assert "blk.2.attn_k.weight" in read_header(file).tensors
    assert torch.equal(logits(open_model(str(file))), logits(open_model(str(directory))))


@pytest.mark.parametrize(
    ("case", "key", "value", "reason"),
    [
        ("deepseek", "expert_gating_func", 2, "expert_gating_func = 2 is not supported"),
        ("deepseek", "expert_weights_norm", True, "expert_weights_norm = True is not supported"),
        ("deepseek", "attention.temperature_scale", 0.1, "temperature_scale may change the mathematics"),
        ("deepseek", "rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor may change the mathematics"),
        ("deepseek", "attention.key_length", 7, "attention.key_length = 7 is not supported"),
        ("deepseek", "rope.scaling.type", "yarn", "yarn_log_multiplier' is missing"),
        ("deepseek", "attention.key_length_mla", 65, "attn_v_b should be matrices of 4 heads"),
        ("gemma4-large", "attention.head_count_kv", [2, 1, 1, 1], "KV heads"),
        ("gemma4-large", "attention.head_count_kv", [2, 1], "2 layers of 4"),
        ("gemma4-large", "attention.sliding_window_pattern", [True] * 4, "last layer with a window"),
        ("gemma4-large", "rope.scaling.type", "linear", "rope.scaling.type = 'linear' is not supported"),
        ("gemma4-large", "rope.dimension_count", 32, "rope.dimension_count = 32 is not supported"),
        ("gemma4-small", "feed_forward_length", [192, 192, 200, 384], "MLPs of"),
        ("gemma4-small", "attention.scale", 2.0, "attention.scale may change the mathematics"),
        ("gemma4-small", "block_count", 10**7, "block_count should be"),
        ("phi3-long", "rope.scaling.original_context_length", 0, "original_max_position_embeddings|context was of 0"),
    ],
)
def test_what_would_change_the_mathematics(case: str, key: str, value: object, reason: str, tmp_path: Path) -> None:
    _, file = both(tmp_path, case, Kind.F32)
    header = read_header(file)
    changed = header.metadata | {f"{header.architecture}.{key}": value}
    header = GgufHeader(header.path, changed, header.tensors)
    with pytest.raises(KvistError, match=reason):
        parts_of(header, read_config(config_of(header), "test"))


def test_how_attention_grows_with_the_context(tmp_path: Path) -> None:
    """What the file says, unless it is the usual rounded to float32."""
    _, file = both(tmp_path, "phi3-long", Kind.F32)
    header = read_header(file)
    header.metadata["phi3.rope.scaling.attn_factor"] = 1.25
    config = read_config(config_of(header), "test")
    assert config.rope.scale == 1.25
    assert config.rope.divisors == tuple(LONG["long_factor"])


@pytest.mark.parametrize(("factors", "reason"), [([1.0, 2.0, 1e30], "not supported"), ([1.0, 2.0, 2.0], "slows")])
def test_frequencies_of_gemma4(factors: list[float], reason: str, tmp_path: Path) -> None:
    _, file = both(tmp_path, "gemma4-small", Kind.F32)
    header = read_header(file)
    raw, tensor = bytearray(file.read_bytes()), header.tensors["rope_freqs.weight"]
    many = factors[:-1] + factors[-1:] * (tensor.shape[0] - len(factors) + 1)
    raw[tensor.start : tensor.start + tensor.nbytes] = np.array(many, np.float32).tobytes()
    file.write_bytes(raw)
    with pytest.raises(ConfigError, match=reason):
        config_of(header)
