"""Many requests that share, compete and are put off: who is served when, what is computed, and always the same
tokens."""

import random
from dataclasses import replace

import pytest
import torch

from kvist.base.errors import InvariantError
from kvist.base.events import CacheEvent, Evicted, Reserved
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.scheduler import _line
from kvist.runtime.sequence import Sequence
from oracle import LLAMA, fresh, make_runner, tokens_of

WARM = Sampling(temperature=1.0, top_k=40, top_p=0.95)
TALL = replace(LLAMA, head_dim=32)  # heads that the codecs over rotated vectors take


def crowded(kv: str, blocks: int, sequences: int, events: list[CacheEvent] | None = None) -> Runner:
    config = LLAMA if kv == "fp32" else TALL
    base = make_runner(config, kv=kv)
    listener = None if events is None else events.append
    return Runner(base.model, base.layout, blocks, base.backend, listener, sequences, tails=sequences)


def run_out(engine: Engine) -> None:
    while not engine.idle:
        engine.step()
        engine.check()


def alone(engine: Engine, request: Request) -> Sequence:
    """On an empty cache."""
    engine.runner.manager.tree.clear()
    sequence = engine.add(request)
    run_out(engine)
    return sequence


def family(rng: random.Random, count: int) -> list[Request]:
    """Requests of mixed lengths, of which many begin alike."""
    bases = [tokens_of(rng, 220) for _ in range(3)]
    requests = []
    for seed in range(count):
        shared = rng.choice(bases)[: rng.randint(1, 220)] if rng.random() < 0.7 else []
        prompt = (*shared, *tokens_of(rng, rng.randint(1, 40)))
        sampling = Sampling() if rng.random() < 0.3 else replace(WARM, seed=seed)
        requests.append(Request(prompt, rng.randint(1, 150), sampling, priority=rng.randint(0, 6)))
    return requests


@pytest.mark.parametrize("kv", ["fp32", "turbo4"])
def test_sixty_four_at_once_with_cancels_and_preemptions_draw_what_each_draws_alone(kv: str) -> None:
    rng = random.Random(11)
    events: list[CacheEvent] = []
    engine = Engine(crowded(kv, blocks=11, sequences=12, events=events), step_tokens=48)
    oracle = Engine(crowded(kv, blocks=11, sequences=12))
    requests = family(rng, 64)
    sequences: list[Sequence] = []
    cancelled = 0
    while not engine.idle or len(sequences) < len(requests):
        while len(sequences) < len(requests) and rng.random() < 0.2:
            sequences.append(engine.add(requests[len(sequences)]))
        engine.step()
        engine.check()
        unfinished = [sequence for sequence in sequences if sequence.finish_reason is None]
        if unfinished and rng.random() < 0.01:
            engine.finish(rng.choice(unfinished), FinishReason.CANCELLED)
            cancelled += 1
    assert cancelled > 5
    assert engine.scheduler.preemptions > 5
    assert sum(sequence.cached.prompt for sequence in sequences) > 1000
    assert sum(sequence.cached.resume for sequence in sequences) > 100
    assert sum(isinstance(event, Evicted) for event in events) > 50
    assert sum(event.copies for event in events if isinstance(event, Reserved)) > (5 if kv == "fp32" else 0)
    for sequence, request in zip(sequences, requests, strict=True):
        expected = alone(oracle, request).new_tokens
        assert sequence.new_tokens == expected[: len(sequence.new_tokens)]
        if sequence.finish_reason is not FinishReason.CANCELLED:
            assert len(sequence.new_tokens) == len(expected)
    manager = engine.runner.manager
    assert not list(manager.leases)
    assert manager.pool.used == manager.tree.idle
    manager.tree.clear()
    assert manager.pool.free == manager.pool.capacity


def test_a_prefix_is_computed_once_for_all_who_ask_for_it_at_the_same_time() -> None:
    """Eight prompts of 200 tokens that part at token 190 arrive together; a ninth comes later."""
    rng = random.Random(12)
    engine = Engine(make_runner(blocks=64), step_tokens=64)
    base = tokens_of(rng, 190)
    requests = [Request((*base, *tokens_of(rng, 10)), 3) for _ in range(9)]
    sequences = [engine.add(request) for request in requests[:8]]
    run_out(engine)
    late = engine.add(requests[8])
    run_out(engine)
    necessary = 190 + 9 * 10 + 9 * 2
    # A block in which they part is shared too, once it is full; one of them may have begun to compute it by then.
    assert necessary <= engine.counters.computed < necessary + 64
    assert sequences[0].cached.prompt == 0
    assert min(sequence.cached.prompt for sequence in sequences[1:]) >= 128
    assert late.cached.prompt >= 190
    oracle = Engine(make_runner(blocks=64))
    for sequence in (*sequences, late):
        assert sequence.new_tokens == alone(oracle, sequence.request).new_tokens


def test_choices_compute_their_prompt_once_and_copy_on_write() -> None:
    events: list[CacheEvent] = []
    engine = Engine(make_runner(blocks=64, listener=events.append))
    request = Request(tuple(tokens_of(random.Random(13), 100)), 20, replace(WARM, seed=2**64 - 2))
    sequences = engine.add_choices(request, 4)
    engine.step()
    assert engine.counters.computed == 100
    assert [len(sequence.new_tokens) for sequence in sequences] == [1] * 4
    assert engine.runner.manager.pool.used == 2, "they hold the same two blocks"
    run_out(engine)
    assert [sequence.cached.fork for sequence in sequences] == [0, 100, 100, 100]
    assert sum(event.copies for event in events if isinstance(event, Reserved)) == 3
    assert len({tuple(sequence.new_tokens) for sequence in sequences}) == 4
    oracle = Engine(make_runner(blocks=64))
    for index, sequence in enumerate(sequences):
        seeded = replace(request, sampling=replace(WARM, seed=(2**64 - 2 + index) % 2**64))
        assert sequence.new_tokens == alone(oracle, seeded).new_tokens


def test_choices_end_one_by_one_and_lead_on_when_the_first_is_cancelled() -> None:
    engine = Engine(make_runner(blocks=64), step_tokens=16)
    request = Request(tuple(tokens_of(random.Random(14), 100)), 5, replace(WARM, seed=1))
    first, second, third = engine.add_choices(request, 3)
    engine.step()
    engine.finish(second, FinishReason.CANCELLED)
    engine.finish(first, FinishReason.CANCELLED)
    engine.check()
    run_out(engine)
    assert (first.new_tokens, second.new_tokens) == ([], [])
    assert third.new_tokens == alone(engine, third.request).new_tokens
    engine.finish(third, FinishReason.CANCELLED)
    assert third.finish_reason is FinishReason.LENGTH


def test_more_choices_than_may_run_at_once_wait_for_their_turn() -> None:
    engine = Engine(crowded("fp32", blocks=16, sequences=2))
    request = Request(tuple(tokens_of(random.Random(15), 70)), 4, replace(WARM, seed=1))
    sequences = engine.add_choices(request, 5)
    run_out(engine)
    oracle = Engine(make_runner())
    assert [s.new_tokens for s in sequences] == [alone(oracle, s.request).new_tokens for s in sequences]


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_short_ones() -> None:
    rng = random.Random(16)
    engine = Engine(make_runner(blocks=64), step_tokens=32)
    long = engine.add(Request(tuple(tokens_of(rng, 600)), 2))
    engine.step()
    short = engine.add(Request(tuple(tokens_of(rng, 20)), 1))
    for _ in range(3):
        engine.step()
    assert short.finish_reason is FinishReason.LENGTH
    assert long.lease is not None
    steps = 0
    while not long.new_tokens:
        engine.add(Request(tuple(tokens_of(rng, 30)), 1))
        engine.step()
        steps += 1
    assert steps <= 600 / 16, "at least half of each step is the first one's"


def test_the_next_tokens_of_answers_come_with_every_step_beside_a_long_prompt() -> None:
    rng = random.Random(17)
    engine = Engine(make_runner(blocks=64), step_tokens=32)
    answers = [engine.add(Request(tuple(tokens_of(rng, 5)), 20)) for _ in range(4)]
    engine.step()
    engine.add(Request(tuple(tokens_of(rng, 400)), 1))
    for count in range(2, 10):
        engine.step()
        assert [len(sequence.new_tokens) for sequence in answers] == [count] * 4


def test_more_answers_than_a_step_holds_take_turns() -> None:
    rng = random.Random(18)
    engine = Engine(crowded("fp32", blocks=32, sequences=12), step_tokens=5)
    sequences = [engine.add(Request((token,), 12)) for token in tokens_of(rng, 12)]
    while engine.scheduler.waiting:
        engine.step()
    before = [len(sequence.new_tokens) for sequence in sequences]
    for _ in range(12):
        engine.step()
    grown = [len(sequence.new_tokens) - count for sequence, count in zip(sequences, before, strict=True)]
    assert max(grown) - min(grown) <= 2
    run_out(engine)


def test_the_urgent_one_is_served_first_and_takes_the_place_of_others() -> None:
    rng = random.Random(19)
    engine = Engine(crowded("fp32", blocks=6, sequences=2), step_tokens=32)
    patient = [engine.add(Request(tuple(tokens_of(rng, 100)), 30, priority=5)) for _ in range(3)]
    for _ in range(4):
        engine.step()
    urgent = engine.add(Request(tuple(tokens_of(rng, 100)), 5, priority=-1))
    while urgent.finish_reason is None:
        engine.step()
        engine.check()
    assert all(sequence.finish_reason is None for sequence in patient)
    assert engine.scheduler.preemptions >= 1
    run_out(engine)
    oracle = Engine(make_runner())
    for sequence in patient:
        assert sequence.new_tokens == alone(oracle, sequence.request).new_tokens


def test_a_tenant_who_floods_the_queue_does_not_keep_another_waiting() -> None:
    rng = random.Random(20)
    engine = Engine(crowded("fp32", blocks=8, sequences=2), step_tokens=32)
    flood = [engine.add(Request(tuple(tokens_of(rng, 60)), 4, tenant="a")) for _ in range(20)]
    for _ in range(6):
        engine.step()
    guests = [engine.add(Request(tuple(tokens_of(rng, 60)), 4, tenant="b")) for _ in range(3)]
    while any(sequence.finish_reason is None for sequence in guests):
        engine.step()
        engine.check()
    done = sum(sequence.finish_reason is not None for sequence in flood)
    assert done <= 3 + 3 + 2, "as many of the one as of the other, and those that ran before"
    run_out(engine)


def test_tenants_share_no_blocks() -> None:
    engine = Engine(make_runner())
    prompt = tuple(tokens_of(random.Random(21), 150))
    found = []
    for tenant in ("a", "b", "a"):
        sequence = engine.add(Request(prompt, 2, tenant=tenant))
        run_out(engine)
        found.append(sequence.cached.prompt)
    assert found == [0, 0, 149]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("step_tokens", [None, 33])
def test_log_probabilities_of_the_prompt_are_those_of_a_run_from_nothing(cached: bool, step_tokens: int | None) -> None:
    prompt = tuple(tokens_of(random.Random(22), 200))
    engine, oracle = Engine(make_runner(), step_tokens), make_runner()
    if cached:
        engine.add(Request(prompt, 3))
        run_out(engine)
    sequence = engine.add(Request(prompt, 0, prompt_logprobs=2))
    run_out(engine)
    expected = fresh(oracle, list(prompt)).double().log_softmax(-1)
    assert len(sequence.prompt_logprobs) == len(prompt) - 1
    for position, found in enumerate(sequence.prompt_logprobs):
        row = expected[position]
        assert found.logprob == pytest.approx(float(row[prompt[position + 1]]), abs=1e-5)
        assert [token for token, _ in found.top] == row.topk(2).indices.tolist()
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.new_tokens == []


def test_hidden_states_are_summed_in_one_order_whatever_the_steps() -> None:
    prompt = tuple(tokens_of(random.Random(23), 150))
    sums = []
    for step_tokens, others in ((None, 0), (7, 0), (32, 3)):
        engine = Engine(make_runner(), step_tokens)
        for index in range(others):
            engine.add(Request(prompt[index:], 10))
        sequence = engine.add(Request(prompt, 0, pooled=True))
        run_out(engine)
        assert sequence.pooled is not None
        sums.append(sequence.pooled)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    assert bool(sums[0].any())


def test_a_grown_sequence_is_put_off_when_blocks_run_out_and_goes_on_from_what_is_left() -> None:
    """Two sequences that fit when they come and not when they have grown: the later one waits for the first."""
    rng = random.Random(24)
    engine = Engine(crowded("fp32", blocks=5, sequences=2))
    first, second = (engine.add(Request(tuple(tokens_of(rng, 100)), 90)) for _ in range(2))
    run_out(engine)
    assert (first.preempted, second.preempted) == (0, 1)
    assert second.cached.resume >= 64
    assert (second.cached.prompt, sum(second.cached.tiers.values())) == (0, 0)
    assert sum(second.cached.resume_tiers.values()) == second.cached.resume
    assert second.loss is None, "what was lost of its own is no loss of the prompt's"
    oracle = Engine(make_runner())
    for sequence in (first, second):
        assert sequence.new_tokens == alone(oracle, sequence.request).new_tokens


def test_what_is_found_is_counted_once_however_often_it_waits_for_room() -> None:
    rng = random.Random(25)
    engine = Engine(crowded("fp32", blocks=8, sequences=4))
    base = tuple(tokens_of(rng, 200))
    engine.add(Request(base, 2))
    run_out(engine)
    engine.add(Request(tuple(tokens_of(rng, 100)), 60))
    engine.step()
    waiting = engine.add(Request((*base, *tokens_of(rng, 250)), 2))
    refused = 0
    while not waiting.new_tokens:
        engine.step()
        refused += waiting.lease is None
    run_out(engine)
    assert refused > 2
    assert 0 < waiting.cached.prompt <= 200
    assert waiting.cached.prompt == sum(waiting.cached.tiers.values())


def test_the_check_of_a_scheduler_can_fail() -> None:
    engine = Engine(make_runner())
    engine.add(Request((1, 2, 3), 5))
    engine.step()
    engine.check()
    engine.scheduler.most_running = 0
    with pytest.raises(InvariantError, match="1 sequences run where 0 may"):
        engine.check()


def test_priorities_count_within_a_tenant_and_take_nothing_from_others() -> None:
    """One tenant asks for everything at the highest priority, again and again; another for one thing at the lowest."""
    rng = random.Random(26)
    engine = Engine(crowded("fp32", blocks=6, sequences=2), step_tokens=32)

    def urgent() -> Sequence:
        return engine.add(Request(tuple(tokens_of(rng, 60)), 4, tenant="a", priority=-(2**31)))

    flood = [urgent() for _ in range(6)]
    for _ in range(4):
        engine.step()
    guest = engine.add(Request(tuple(tokens_of(rng, 100)), 40, tenant="b", priority=2**31 - 1))
    before = len(flood)
    while guest.finish_reason is None:
        flood.append(urgent())
        engine.step()
        engine.check()
        assert len(flood) < before + 200, "it waits for those who call themselves urgent"
    assert guest.preempted == 0
    run_out(engine)
    assert guest.new_tokens == alone(Engine(make_runner()), guest.request).new_tokens


def test_the_urgent_one_preempts_its_own_tenants_and_no_others() -> None:
    rng = random.Random(27)
    engine = Engine(crowded("fp32", blocks=7, sequences=2), step_tokens=32)
    mine, other = (engine.add(Request(tuple(tokens_of(rng, 100)), 60, tenant=tenant, priority=5)) for tenant in "ab")
    for _ in range(9):
        engine.step()
    assert len(engine.scheduler.running) == 2
    urgent = engine.add(Request(tuple(tokens_of(rng, 100)), 5, tenant="a"))
    run_out(engine)
    assert (mine.preempted, other.preempted, urgent.preempted) == (1, 0, 0)
    assert urgent.times.last < mine.times.last


def test_a_line_keeps_the_places_of_tenants_and_orders_each_ones_own() -> None:
    engine = Engine(make_runner())
    asked = [("a", 5), ("b", 3), ("a", 0), ("b", 1), ("c", 9), ("a", 5)]
    sequences = [engine.add(Request((1,), 1, tenant=tenant, priority=priority)) for tenant, priority in asked]
    ordered = _line(sequences, lambda sequence: (0.0, sequence.number))
    assert [sequence.number for sequence in ordered] == [2, 3, 0, 1, 4, 5]
