"""Many requests on one engine: each draws the tokens that it draws alone, and everything is given back."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvist.base.errors import InvariantError, NumericsError, RequestError
from kvist.runtime.batch import Work
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.sampler import sample
from kvist.runtime.sequence import Sequence
from oracle import LLAMA, fresh, make_runner, tokens_of

WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95)


def random_request(rng: random.Random, longest: int = 200) -> Request:
    sampling = Sampling() if rng.random() < 0.3 else replace(WARM, seed=rng.randrange(2**64))
    return Request(tuple(tokens_of(rng, rng.randint(1, longest))), rng.randint(1, 30), sampling)


def recomputed(runner: Runner, request: Request) -> list[int]:
    """What the request draws when each token is computed from nothing, one sequence at a time."""
    tokens = list(request.prompt)
    for _ in range(request.max_tokens):
        tokens.append(sample(fresh(runner, tokens)[-1], request.sampling, len(tokens)))
    return tokens[len(request.prompt) :]


def run_out(engine: Engine) -> None:
    while not engine.idle:
        engine.step()
        engine.check()


def assert_given_back(engine: Engine) -> None:
    """Nobody holds anything but the prefix tree, and that would give it up."""
    manager = engine.runner.manager
    assert not list(manager.leases)
    assert manager.pool.used == len(manager.tree) == manager.tree.idle
    engine.check()


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The number of tokens of each sequence in each step, as they are run."""
    steps: list[list[int]] = []
    run = engine.runner.run

    def watched(works: list[Work]) -> list[torch.Tensor]:
        steps.append([len(work.tokens) for work in works])
        return run(works)

    monkeypatch.setattr(engine.runner, "run", watched)
    return steps


@pytest.mark.parametrize("step_tokens", [None, 37, 1])
def test_tokens_are_those_of_a_run_without_cache_alone(
    step_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    oracle, engine = make_runner(), Engine(make_runner(), step_tokens)
    requests = [random_request(rng, 90) for _ in range(6)]
    steps = watch(engine, monkeypatch)
    sequences: list[Sequence] = []
    while not engine.idle or len(sequences) < len(requests):
        if len(sequences) < len(requests) and (engine.idle or rng.random() < 0.5):
            sequences.append(engine.add(requests[len(sequences)]))
        engine.step()
        engine.check()
    for sequence, request in zip(sequences, requests, strict=True):
        assert sequence.new_tokens == recomputed(oracle, request)
        assert sequence.finish_reason is FinishReason.LENGTH
    assert_given_back(engine)
    assert max(map(sum, steps)) <= engine.scheduler.step_tokens
    if step_tokens != 1:
        assert any(len(step) > 2 and 1 in step and max(step) > 1 for step in steps), "prefill beside decode"


def test_a_seed_draws_the_same_tokens_whatever_runs_beside_it() -> None:
    prompt = tuple(tokens_of(random.Random(2), 50))

    def drawn(seed: int, beside: int) -> list[int]:
        engine = Engine(make_runner())
        for other in range(beside):
            engine.add(Request(prompt[: 5 + other], 20, replace(WARM, seed=other)))
        sequence = engine.add(Request(prompt, 20, replace(WARM, seed=seed)))
        run_out(engine)
        return sequence.new_tokens

    assert drawn(7, 0) == drawn(7, 0) == drawn(7, 1) == drawn(7, 5)
    assert drawn(7, 0) != drawn(8, 0)


def test_a_pool_smaller_than_all_requests_serves_them_all() -> None:
    """Three blocks: at most one long or three short sequences at a time, and all come to their end."""
    rng = random.Random(3)
    engine = Engine(make_runner(blocks=3))
    requests = [Request(tuple(tokens_of(rng, length)), 10, WARM) for length in (100, 20, 150, 20, 20, 20)]
    sequences = [engine.add(request) for request in requests]
    while not engine.idle:
        engine.step()
        engine.check()
        assert sum(len(lease.table) for lease in engine.runner.manager.leases) <= 3
    oracle = make_runner()
    assert [sequence.new_tokens for sequence in sequences] == [recomputed(oracle, request) for request in requests]
    assert_given_back(engine)


def test_cancelling_gives_everything_back_wherever_a_sequence_stands() -> None:
    rng = random.Random(4)
    engine = Engine(make_runner(blocks=4), step_tokens=32)
    decoding = engine.add(Request(tuple(tokens_of(rng, 20)), 50))
    prefilling = engine.add(Request(tuple(tokens_of(rng, 90)), 20))
    waiting = engine.add(Request(tuple(tokens_of(rng, 90)), 20))
    for _ in range(3):
        engine.step()
    assert decoding.new_tokens
    assert prefilling.lease is not None
    assert not prefilling.new_tokens
    assert waiting.lease is None
    for sequence in (waiting, prefilling, decoding):
        engine.finish(sequence, FinishReason.CANCELLED)
        engine.finish(sequence, FinishReason.STOP)
        assert sequence.finish_reason is FinishReason.CANCELLED
        engine.check()
    assert engine.idle
    assert engine.step() == []
    assert_given_back(engine)
    assert (decoding.kv_blocks, prefilling.kv_blocks, waiting.kv_blocks) == (1, 2, 0)


def test_requests_come_and_go_at_random_and_the_rest_is_untouched() -> None:
    """Hundreds of steps of arrivals, cancellations and stops, checked after each; then token by token."""
    rng = random.Random(5)
    engine, oracle = Engine(make_runner(blocks=12), step_tokens=64), Engine(make_runner(blocks=12))
    sequences: list[Sequence] = []
    cancelled = 0
    for _ in range(400):
        if rng.random() < 0.15:
            request = random_request(rng)
            sequences.append(engine.add(replace(request, stop_ids=frozenset(tokens_of(rng, 2)))))
        unfinished = [sequence for sequence in sequences if sequence.finish_reason is None]
        if unfinished and rng.random() < 0.03:
            engine.finish(rng.choice(unfinished), FinishReason.CANCELLED)
            cancelled += 1
        engine.step()
        engine.check()
    run_out(engine)
    assert_given_back(engine)
    assert cancelled > 5
    reasons = [sequence.finish_reason for sequence in sequences]
    assert min(reasons.count(reason) for reason in FinishReason if reason is not FinishReason.FAILED) > 3
    for sequence in sequences:
        alone = oracle.add(sequence.request)
        run_out(oracle)
        assert sequence.new_tokens == alone.new_tokens[: len(sequence.new_tokens)]
        if sequence.finish_reason is not FinishReason.CANCELLED:
            assert (sequence.new_tokens, sequence.finish_reason) == (alone.new_tokens, alone.finish_reason)


def test_generation_ends_at_a_stop_token_at_the_length_asked_for_and_at_the_end_of_the_context() -> None:
    config = replace(LLAMA, max_positions=40)
    prompt = tuple(tokens_of(random.Random(6), 30))

    def ended(request: Request) -> Sequence:
        engine = Engine(make_runner(config))
        sequence = engine.add(request)
        run_out(engine)
        return sequence

    whole = ended(Request(prompt, 1000, WARM))
    assert whole.finish_reason is FinishReason.LENGTH
    # The last token is drawn from position 39's logits and never written: 40 positions, 41 tokens.
    assert len(whole.tokens) == 41
    short = ended(Request(prompt, 4, WARM))
    assert (short.new_tokens, short.finish_reason) == (whole.new_tokens[:4], FinishReason.LENGTH)
    stop = whole.new_tokens[5]
    first = whole.new_tokens.index(stop)
    stopped = ended(Request(prompt, 1000, WARM, frozenset({stop})))
    assert (stopped.new_tokens, stopped.finish_reason) == (whole.new_tokens[: first + 1], FinishReason.STOP)
    full = ended(Request(tuple(tokens_of(random.Random(7), 40)), 5, WARM))
    assert (len(full.new_tokens), full.finish_reason) == (1, FinishReason.LENGTH)


def test_requests_that_can_never_run_are_refused_with_numbers() -> None:
    engine = Engine(make_runner(replace(LLAMA, max_positions=300), blocks=3))
    with pytest.raises(RequestError, match="prompt is too long: 305 tokens > 300 maximum"):
        engine.add(Request((1,) * 305, 1))
    with pytest.raises(
        RequestError, match="the request needs 4 KV blocks and the pool has 3: it may come to 193 tokens and 192 fit"
    ):
        engine.add(Request((1,) * 190, 4))
    with pytest.raises(RequestError, match="needs 5 KV blocks and the pool has 3"):
        engine.add(Request((1,), 10_000))
    for token in (-1, 67):
        with pytest.raises(RequestError, match="outside the vocabulary of 67"):
            engine.add(Request((1, token), 1))
    with pytest.raises(ValueError, match="at least one token, got 0"):
        Engine(engine.runner, step_tokens=0)
    assert engine.idle
    fits = engine.add(Request((1,) * 190, 3))
    run_out(engine)
    assert fits.kv_blocks == 3
    assert_given_back(engine)


def test_weights_that_are_not_numbers_end_their_requests_and_leave_the_pool_clean() -> None:
    engine = Engine(make_runner(blocks=3))
    running, waiting = engine.add(Request((1,) * 100, 5)), engine.add(Request((2,) * 90, 5))
    head = engine.runner.model.head_weight()
    kept = head.clone()
    head[3] = torch.inf
    while running.finish_reason is None:
        engine.step()
    assert running.finish_reason is FinishReason.FAILED
    assert isinstance(running.error, NumericsError)
    assert waiting.finish_reason is None
    engine.check()
    head.copy_(kept)
    run_out(engine)
    assert waiting.new_tokens == recomputed(make_runner(), waiting.request)
    assert_given_back(engine)


def test_a_sequence_whose_numbers_are_not_finite_ends_alone() -> None:
    """One token's embedding is damaged: the request that holds it fails, and the step is run again for its
    neighbours."""
    engine, rng = Engine(make_runner()), random.Random(8)
    engine.runner.model.embed.weight[5] = torch.nan
    bad = engine.add(Request((1, 2, 5), 4))
    good = [engine.add(Request(tuple(token for token in tokens_of(rng, 20) if token != 5), 1)) for _ in range(3)]
    run_out(engine)
    assert bad.finish_reason is FinishReason.FAILED
    oracle = make_runner()
    assert [sequence.new_tokens for sequence in good] == [recomputed(oracle, sequence.request) for sequence in good]


def _running(engine: Engine) -> list[Sequence]:
    return engine.scheduler.running


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda engine: engine.runner.manager.release(_running(engine)[0].lease), "holds one that has ended"),
        (
            lambda engine: setattr(engine.scheduler.running[1], "lease", _running(engine)[0].lease),
            "shares its lease",
        ),
        (lambda engine: _running(engine)[0].tokens.pop(), "nothing left to compute"),
        (
            lambda engine: setattr(engine.scheduler.waiting[0], "lease", engine.runner.manager.open()),
            "a waiting sequence holds",
        ),
        (lambda engine: engine.runner.manager.pool._free.pop(), "not free"),
    ],
)
def test_the_check_of_an_engine_can_fail(damage: Callable[[Engine], None], finding: str) -> None:
    engine = Engine(make_runner(blocks=3))
    for length in (5, 60, 100):
        engine.add(Request((1,) * length, 4))
    engine.step()
    engine.check()
    damage(engine)
    with pytest.raises(InvariantError, match=finding):
        engine.check()
