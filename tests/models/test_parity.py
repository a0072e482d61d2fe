"""The same logits as transformers in float32, through the loader, the cache and each backend."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_checkpoints import CASES, VOCAB, Written
from safetensors import safe_open

from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.families import load_config
from kvist.models.load import load
from kvist.models.plain import plain_views
from kvist.ops.backend import select
from kvist.runtime.runner import Runner
from kvist.weights.checkpoint import SINGLE_FILE, save
from oracle import feed, tokens_of

TOLERANCE = 1e-4
PREFILL, STEPS = 72, 32  # past one block of 64, and past the 64 positions that llama3 scaling starts from


def runner_of(directory: Path, config: ModelConfig, backend_name: str | None = None) -> Runner:
    """A float32 runner over the checkpoint, read as `config` says."""
    backend = select("cpu", torch.float32, config.head_dim, 64, backend_name)
    return Runner(load(directory, config, backend), plan_layout(config.layer_specs(), codec("fp32")), 4, backend)


def prefill_and_decode(runner: Runner, tokens: list[int]) -> torch.Tensor:
    """Logits of a prefill, then of one step per token."""
    lease = runner.manager.open()
    return feed(runner, lease, tokens, [PREFILL] + [1] * STEPS)


@pytest.mark.parametrize("case", list(CASES))
def test_logits_are_those_of_transformers(case: str, written: Callable[[str], Written], backend_name: str) -> None:
    theirs = written(case)
    config = load_config(theirs.directory)
    tokens = tokens_of(random.Random(0), PREFILL + STEPS, VOCAB)
    runner = runner_of(theirs.directory, config, backend_name)
    assert runner.backend.name == backend_name
    expected = theirs.logits(tokens)
    assert float(expected.std()) > 0.3, "logits too alike for a tolerance to mean anything"
    torch.testing.assert_close(prefill_and_decode(runner, tokens), expected, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        views = plain_views(config)
        plain = runner.model.logits(runner.model(torch.tensor(tokens), torch.arange(len(tokens)), views))
    torch.testing.assert_close(plain, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "misread"),
    [
        ("llama-8-scaled", lambda config: replace(config, rope=Rope(config.rope.theta))),
        ("llama-8-scaled", lambda config: replace(config, norm_eps=1e-2)),
        ("llama-48-biased", lambda config: replace(config, rope=replace(config.rope, linear_factor=2.02))),
        ("qwen2-64", lambda config: replace(config, rope=replace(config.rope, theta=10_100.0))),
        ("gpt2-8", lambda config: replace(config, activation=Activation.GELU)),
        ("gpt2-64-exact-gelu", lambda config: replace(config, activation=Activation.GELU_TANH)),
    ],
)
def test_the_tolerance_notices_a_config_that_is_misread(
    case: str, misread: Callable[[ModelConfig], ModelConfig], written: Callable[[str], Written]
) -> None:
    theirs = written(case)
    runner = runner_of(theirs.directory, misread(load_config(theirs.directory)))
    tokens = tokens_of(random.Random(0), PREFILL + STEPS, VOCAB)
    error = (prefill_and_decode(runner, tokens) - theirs.logits(tokens)).abs().max()
    assert float(error) > 2 * TOLERANCE


def test_mobilellm_runs_each_layer_twice(written: Callable[[str], Written], tmp_path: Path) -> None:
    """Held against a Llama that has each of these layers two times."""
    theirs = written("llama-48-biased")
    raw = json.loads((theirs.directory / "config.json").read_text())
    changes = {"model_type": "mobilellm", "layer_sharing": True, "share_embedding": True, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    (tmp_path / SINGLE_FILE).symlink_to(theirs.directory / SINGLE_FILE)
    config = load_config(tmp_path)
    assert len(config.layer_specs()) == 2 * config.layers
    twice = copy.deepcopy(theirs.model)
    twice.model.layers = torch.nn.ModuleList(layer for layer in theirs.model.model.layers for _ in range(2))
    twice.config.num_hidden_layers *= 2
    tokens = tokens_of(random.Random(0), PREFILL + STEPS, VOCAB)
    found = prefill_and_decode(runner_of(tmp_path, config), tokens)
    torch.testing.assert_close(found, Written(twice, tmp_path).logits(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "family", "older"),
    [("gemma3", "gemma3", False), ("gemma3", "gemma3", True), ("gemma4-small", "gemma4", False)],
)
def test_the_text_decoder_of_a_model_that_also_sees(
    case: str, family: str, older: bool, written: Callable[[str], Written], tmp_path: Path
) -> None:
    theirs = written(case)
    raw = json.loads((theirs.directory / "config.json").read_text())
    outer = {"model_type": family, "text_config": raw, "vision_config": {"hidden_size": 8}, "image_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    prefix = "language_model.model." if older else "model.language_model."
    with safe_open(theirs.directory / SINGLE_FILE, "pt") as file:
        tensors = {prefix + name.removeprefix("model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["vision_tower.encoder.weight" if older else "model.vision_tower.encoder.weight"] = torch.ones(2, 2)
    save(tmp_path / SINGLE_FILE, tensors)
    tokens = tokens_of(random.Random(0), PREFILL + STEPS, VOCAB)
    config = load_config(tmp_path)
    assert config.family == family
    found = prefill_and_decode(runner_of(tmp_path, config), tokens)
    torch.testing.assert_close(found, theirs.logits(tokens), rtol=0, atol=TOLERANCE)
