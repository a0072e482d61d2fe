"""GGUF files of further families, as llama.cpp's converter writes them: the same models as from safetensors."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import ARCHITECTURES, write_family
from safetensors.torch import load_file

from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.runtime.batch import Work
from kvist.service.loaded import Loaded, open_model
from kvist.weights.checkpoint import SINGLE_FILE, save
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
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | CAPS,
    "gemma3_text": GEMMA | {"rope_parameters": BOTH, "num_hidden_layers": 7},
    "phi3": RMS | PARTLY | {"sliding_window": 30},
    "smollm3": RMS,
    "qwen3_moe": RMS | EXPERTS | {"head_dim": 32},
    "phi": LAYER | PARTLY,
    "gpt_neox": LAYER | PARTLY | {"attention_bias": True, "use_parallel_residual": True},
    "stablelm": LAYER | PARTLY | {"use_qkv_bias": True, "use_parallel_residual": False},
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.cache_folder", lambda: tmp_path / "cache")


def both(folder: Path, family: str, kind: Kind) -> tuple[Path, Path]:
    """A directory with safetensors and a GGUF file of the same random weights."""
    config = CONFIGS[family] | {"model_type": family}
    if family == "gpt_neox":
        del config["num_key_value_heads"]
    model = randomize(build(read_config(config, "test"), PlainActivations(), torch.float32), seed=3, std=0.2)
    tensors = export(model)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    save(folder / "hf" / SINGLE_FILE, tensors)
    return folder / "hf", write_family(folder / "model.gguf", load_file(folder / "hf" / SINGLE_FILE), config, kind)


def logits(loaded: Loaded) -> torch.Tensor:
    runner = loaded.engine(100).runner
    return runner.run([Work(runner.manager.open(), tokens_of(random.Random(0), 90, VOCAB), 90)])[0]


def test_every_architecture_is_here() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_model_in_both_forms(family: str, tmp_path: Path) -> None:
    directory, file = both(tmp_path, family, Kind.F32)
    theirs, ours = open_model(str(directory)), open_model(str(file))
    assert ours.config == theirs.config
    assert theirs.config.family == family
    for name, weight in theirs.model.named_parameters():
        assert torch.allclose(dict(ours.model.named_parameters())[name], weight, rtol=0, atol=1e-6), name
    # Gemma's norms are stored with one added, which rounds.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=2e-4 if "gemma" in family else 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_quantized(family: str, tmp_path: Path) -> None:
    _, file = both(tmp_path, family, Kind.Q8_0)
    loaded, plain = open_model(str(file)), open_model(str(file), weights="fp32")
    assert loaded.model.is_packed
    assert not plain.model.is_packed
    ours, theirs = logits(loaded), logits(plain)
    rows = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert float(rows.median()) < 0.2, "activations are rounded to 8 bits, and random layers make that larger"
