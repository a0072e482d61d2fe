"""Generations that share an engine, and their reports."""

import pytest
import torch
from tokenizers import Tokenizer as Backend

from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.service.generation import Generation
from kvist.service.loaded import select_backend
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_characters

LETTERS = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture(scope="module")
def runner() -> Runner:
    config = ModelConfig(
        family="llama",
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_positions=200,
        norm_eps=1e-5,
        activation=Activation.SILU,
        rope=Rope(10_000.0),
    )
    layout = plan_layout(config.layer_specs(), codec("fp32"))
    backend = select_backend(config, torch.float32)
    model = randomize(build(config, backend, torch.float32), seed=2, std=0.3)
    return Runner(model, layout, blocks=8, backend=backend)


@pytest.fixture
def tokenizer() -> Tokenizer:
    backend: Backend = train_characters(LETTERS)
    return Tokenizer(backend)


def request(tokenizer: Tokenizer, text: str, seed: int, max_tokens: int = 40) -> Request:
    return Request(tuple(tokenizer.encode(text)), max_tokens, Sampling(temperature=1.0, seed=seed))


def test_a_generation_is_the_same_beside_others(runner: Runner, tokenizer: Tokenizer) -> None:
    wanted = request(tokenizer, "hello", seed=5)
    alone = Generation(Engine(runner), tokenizer, wanted)
    text = "".join(alone)
    engine = Engine(runner)
    others = [engine.add(request(tokenizer, "x" * length, seed=length)) for length in (3, 60)]
    crowded = Generation(engine, tokenizer, wanted)
    assert "".join(crowded) == text == alone.result().text
    assert crowded.result().tokens == alone.result().tokens
    # They really ran beside it.
    assert all(len(other.new_tokens) > 30 for other in others)


def test_result_is_refused_before_the_end(runner: Runner, tokenizer: Tokenizer) -> None:
    generation = Generation(Engine(runner), tokenizer, request(tokenizer, "ab", seed=1))
    with pytest.raises(RuntimeError, match="not ended"):
        generation.result()


def test_cancelling_gives_everything_back(runner: Runner, tokenizer: Tokenizer) -> None:
    asked = iter([False, False, True])
    generation = Generation(Engine(runner), tokenizer, request(tokenizer, "ab", seed=1), cancelled=lambda: next(asked))
    assert len("".join(generation)) == 2
    assert generation.result().finish_reason is FinishReason.CANCELLED
    assert not list(runner.manager.leases)
    assert runner.manager.available == runner.manager.pool.capacity
    runner.manager.check()


def test_a_stop_string_across_tokens_wins_over_the_length(runner: Runner, tokenizer: Tokenizer) -> None:
    wanted = request(tokenizer, "hello", seed=5)
    whole = "".join(Generation(Engine(runner), tokenizer, wanted))
    # The stop string completes in the very last token.
    stopped = Generation(Engine(runner), tokenizer, wanted, stops=(whole[-3:],))
    assert "".join(stopped) == whole[: whole.index(whole[-3:])]
    assert stopped.result().finish_reason is FinishReason.STOP
