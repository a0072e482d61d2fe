"""What a GGUF file will take is told from its beginning, and is what it takes; its run is near plain attention."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf

from kvist.cache.view import OpenView
from kvist.evals.plain_attention import nearness
from kvist.evals.verify import Verifier
from kvist.models.families import read_config
from kvist.models.linear import tensors_of
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.service.loaded import open_model
from kvist.service.plan import KVS, plan_model

CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomize(build(read_config(CONFIG, "config.json"), PlainActivations(), torch.float32), seed=1, std=0.1)
    return write_gguf(tmp_path_factory.mktemp("models") / "wide.gguf", export(model), CONFIG, Kind.Q8_0)


def test_plan(path: Path) -> None:
    found = plan_model("wide", path, KVS, [128])
    assert found.weights["gguf"] == sum(tensor.nbytes for tensor in tensors_of(open_model(str(path)).model).values())
    assert list(found.weights) == ["gguf", "bf16", "int8", "int4"]
    assert [row.kv for row in found.rows] == list(KVS)
    assert json.dumps(found.to_json())


def test_rounding_that_a_wide_packed_model_makes_much_of_is_allowed(path: Path) -> None:
    """Where it is more than a tenth of the largest logit, as much is allowed as it measurably comes to."""
    loaded = open_model(str(path), kv="turbo4")
    verifier = Verifier(loaded, length=320, steps=1, trials=1)
    check = verifier.plain_attention()
    assert check.passed
    assert check.evidence["tolerance"] == pytest.approx(3 * check.evidence["plain_attention_moved_by_rounding"])


@pytest.mark.parametrize("kv", ["turbo4", "turbo3", "int8"])
def test_kernels_that_scale_wrongly_are_far(path: Path, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = open_model(str(path), kv=kv)
    verifier = Verifier(loaded, length=320, steps=1, trials=1)
    tokens = verifier._tokens(320)
    sound = nearness(loaded, tokens, verifier._fresh(tokens))
    assert sound.error <= sound.tolerance
    attend = OpenView.attend
    monkeypatch.setitem(loaded.model.__dict__, "_whole", None)  # layer by layer
    monkeypatch.setattr(OpenView, "attend", lambda self, q, scale, tie=None: attend(self, q, scale * 1.5, tie))
    broken = nearness(loaded, tokens, verifier._fresh(tokens))
    assert broken.tolerance == pytest.approx(sound.tolerance)
    assert broken.error > broken.tolerance
