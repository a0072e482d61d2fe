"""Everything that was let in comes to an end: alone in pools of just its blocks, in tight windows, and whatever a step
raises."""

import random
from collections.abc import Sequence as Tokens
from dataclasses import replace

import pytest
from fake_runner import SIZE, STEP, FakeKept, FakeRunner, alone

from kvist.base.errors import ContextError, KvistError
from kvist.cache import layout as layout_module
from kvist.cache import windows as windows_module
from kvist.cache.manager import CacheManager
from kvist.cache.pool import BlockPool
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.sequence import Sequence
from oracle import LLAMA, make_runner, tokens_of

KINDS = [(False, ()), (True, ()), (False, (3, 6)), (True, (3, 6))]


@pytest.fixture(autouse=True)
def _little_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layout_module, windows_module):
        monkeypatch.setattr(module, "SLACK", SIZE)


def engine_of(lossy: bool, windows: Tokens[int], tight: int | None) -> Engine:
    return Engine(FakeRunner(CacheManager, lossy, windows, tight), STEP, FakeKept())  # type: ignore[arg-type]


def run_out(engine: Engine, most: int = 200) -> None:
    for _ in range(most):
        if engine.idle:
            return
        engine.step()
        engine.check()
    raise AssertionError(f"not at an end after {most} steps")


def is_right(sequence: Sequence, windows: Tokens[int] = ()) -> bool:
    return sequence.error is None and sequence.new_tokens == alone(sequence.request, windows)


@pytest.mark.parametrize(("lossy", "windows"), KINDS)
@pytest.mark.parametrize("length", range(1, 13))
def test_the_same_request_again_and_in_choices_fits_the_pool_that_it_fits_once(
    length: int, lossy: bool, windows: Tokens[int]
) -> None:
    """What the first leaves in the tree is shared by the next, whose copy would take a block more than there is."""
    engine = engine_of(lossy, windows, 12)
    request = Request(tuple(place % 3 for place in range(length)), 13 - length, Sampling(1.0, seed=3))
    for choices in (1, 1, 2, 4, 1):
        sequences = engine.add_choices(request, choices)
        run_out(engine)
        assert all(is_right(sequence, windows) for sequence in sequences)
    assert lossy or sequences[0].cached.prompt == length - 1


def test_what_the_tree_shares_is_copied_where_there_is_room_and_forgotten_where_there_is_none() -> None:
    for tight, kept in ((12, False), (16, True)):
        engine = engine_of(False, (), tight)
        engine.add(Request((1, 2, 0, 1, 2, 0), 1))
        run_out(engine)
        longer = engine.add(Request((1, 2, 0, 1, 2, 0, 1), 6))
        run_out(engine)
        assert longer.cached.prompt == 6
        assert is_right(longer)
        lease = engine.runner.manager.open()
        assert (engine.runner.manager.adopt(lease, (1, 2, 0, 1, 2, 0, 2)) == 6) or not kept


@pytest.mark.parametrize("tight", [10, 12])
def test_what_was_cut_short_is_gone_on_from_in_the_last_block(tight: int) -> None:
    """Each turn of a talk shares the last block of the one before, up to the very end of the pool."""
    engine = engine_of(False, (), tight)
    talk: tuple[int, ...] = (1,)
    while len(talk) < tight:
        turn = engine.add(Request(talk, 1))
        run_out(engine)
        assert is_right(turn)
        talk = (*talk, turn.new_tokens[0] % 3)
    with pytest.raises(ContextError, match="KV blocks and the pool has"):
        engine.add(Request(talk, 4))


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_windows_are_counted(seed: int, lossy: bool) -> None:
    """Prompts of several steps beside answers, with few places: nobody fails for a block of a window."""
    rng, windows = random.Random(seed), (3, 6)
    engine = engine_of(lossy, windows, None if seed % 2 else 24)
    engine.scheduler.most_running = 4
    sequences = []
    for _ in range(40):
        prompt = tuple(rng.randrange(3) for _ in range(rng.randint(1, 20)))
        sequences += engine.add_choices(Request(prompt, rng.randint(1, 5)), rng.choice((1, 1, 2)))
        for _ in range(rng.randint(0, 2)):
            engine.step()
            engine.check()
    run_out(engine, 2000)
    assert all(is_right(sequence, windows) for sequence in sequences)


def test_what_windows_or_open_blocks_have_no_room_for_is_refused_with_numbers() -> None:
    for lossy, windows, name in ((False, (6,), "the layers with a window of 6"), (True, (), "open ones")):
        engine = engine_of(lossy, windows, None)
        manager = engine.runner.manager
        if lossy:
            manager.open_pool = BlockPool(1)
        else:
            manager.windows[0].pool = BlockPool(1)
        with pytest.raises(ContextError, match=rf"needs \d KV blocks of {name} and their pool has 1"):
            engine.add(Request((1,) * 10, 2))
        engine.add(Request((1,) * 3, 2))


PLACES = ["advance", "plan", "run", "publish", "adopt", "draw"]


def break_at(engine: Engine, place: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    owner = {
        "advance": engine.keeper,
        "plan": engine.scheduler,
        "run": engine.runner,
        "publish": engine.runner.manager,
        "adopt": engine.runner.manager,
    }.get(place)

    def broken(*_: object, **__: object) -> None:
        raise error

    if owner is None:
        monkeypatch.setattr("kvist.runtime.sampler.Sampler.draw", broken)
    else:
        monkeypatch.setattr(owner, place, broken)


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), KvistError("a reason")])
@pytest.mark.parametrize("place", PLACES)
def test_whatever_a_step_raises_sequences_end_with_it_and_those_that_come_later_do_not(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(False, (), None)
    request = Request((1, 2, 0, 1, 2), 3)
    with monkeypatch.context() as patched:
        break_at(engine, place, patched, error)
        sequences = [*engine.add_choices(request, 3), engine.add(Request((2, 2), 4))]
        for _ in range(20):
            if engine.idle:
                break
            engine.step()
    assert engine.idle, "a step that fails is tried for ever"
    for sequence in sequences:
        assert sequence.finish_reason is FinishReason.FAILED
        assert isinstance(sequence.error, KvistError)
    assert ("a defect" in caplog.text) == isinstance(error, ZeroDivisionError)
    engine.check()
    later = engine.add(request)
    run_out(engine)
    assert is_right(later)


def test_a_defect_in_one_work_ends_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(False, (), None)
    run = engine.runner.run
    monkeypatch.setattr(
        engine.runner, "run", lambda works: run(works) if all(7 not in w.tokens for w in works) else 1 / 0
    )
    good, bad = engine.add(Request((1, 2, 0), 3)), engine.add(Request((1, 7), 3))
    run_out(engine)
    assert is_right(good)
    assert bad.finish_reason is FinishReason.FAILED


def test_an_interrupted_step_ends_what_runs_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(False, (), None)
    sequence = engine.add(Request((1, 2, 0), 3))

    def interrupted(works: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert sequence.finish_reason is FinishReason.CANCELLED
    engine.check()


@pytest.mark.parametrize("kv", ["fp32", "bf16", "turbo4"])
def test_a_model_in_the_pool_of_one_request(kv: str) -> None:
    """The same over tensors: three blocks, asked for to the last token, again, and in choices."""
    base = make_runner(replace(LLAMA, head_dim=32), kv=kv)
    engine = Engine(Runner(base.model, base.layout, 3, base.backend, sequences=4, tails=4))
    request = Request(tuple(tokens_of(random.Random(1), 150)), 43, Sampling(1.0, seed=5))
    first = engine.add(request)
    run_out(engine)
    again = engine.add(request)
    run_out(engine)
    choices = engine.add_choices(request, 3)
    run_out(engine, 600)
    assert first.new_tokens == again.new_tokens == choices[0].new_tokens
    assert again.cached.prompt == 149 if kv != "turbo4" else again.cached.prompt >= 128
    assert all(len(sequence.new_tokens) == 43 and sequence.error is None for sequence in choices)
