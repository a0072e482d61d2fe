"""A real trained model end to end: the same continuation as transformers gives, token by token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.models.families import load_config
from kvist.models.load import load
from kvist.ops.backend import select
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request
from kvist.runtime.runner import Runner
from kvist.text.tokenizer import Tokenizer
from kvist.weights.llama2c import convert


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 260,032 trained parameters that tells stories."""
    directory = tmp_path_factory.mktemp("stories") / "checkpoint"
    convert(shared_data / "stories260K", directory)
    return directory


@torch.inference_mode()
def test_a_trained_model_continues_as_transformers_does(stories: Path) -> None:
    config = load_config(stories)
    backend = select("cpu", torch.float32, config.head_dim, 64)
    runner = Runner(load(stories, config, backend), plan_layout(config.layer_specs(), codec("fp32")), 8, backend)
    engine = Engine(runner, step_tokens=5)
    tokenizer = Tokenizer.load(stories)
    sequence = engine.add(Request(tuple(tokenizer.encode("Once upon a time")), 100))
    while not engine.idle:
        engine.step()
    theirs = AutoModelForCausalLM.from_pretrained(stories)
    expected = theirs(torch.tensor([sequence.tokens[:-1]])).logits[0].argmax(-1)
    prompt = len(sequence.request.prompt)
    assert sequence.new_tokens == expected[prompt - 1 :].tolist()
    assert tokenizer.decode(sequence.tokens).startswith("Once upon a time, there was a")
    assert len(set(sequence.new_tokens)) > 30, "a story, not a loop"
