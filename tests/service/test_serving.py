"""Sessions on the engine's thread: the tokens of a run alone, whatever readers do; and everything is given back."""

import asyncio
import itertools
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvist.base.errors import ContextError, KvistError, NumericsError, Overloaded, RequestError, Stopping, TimedOut
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.service.facts import Cause, Fact, Matched, RequestDone, StepDone
from kvist.service.generation import Generation
from kvist.service.serving import Serving
from kvist.service.session import Delta, Job, Session
from kvist.service.watch import LONGEST, Watch
from tiny_model import CONTEXT, open_serving, write_tiny_model

pytestmark = pytest.mark.anyio
WARM = Sampling(temperature=1.0, top_k=50)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("serving") / "tiny")


@asynccontextmanager
async def started(directory: Path, **options: object) -> AsyncIterator[Serving]:
    serving = open_serving(directory, **options)  # type: ignore[arg-type]
    serving.start()
    try:
        yield serving
        if serving.alive:
            await serving.check()
            load = serving.load()
            assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
    finally:
        await serving.stop(0)
        assert not serving.alive


def prompt(serving: Serving, rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(300) for _ in range(length))


async def read(session: Session, pause: Callable[[], Awaitable[None]] | None = None) -> list[Delta]:
    deltas = []
    async for delta in session:
        deltas.append(delta)
        if pause is not None:
            await pause()
    return deltas


def tokens(deltas: list[Delta], choice: int = 0) -> list[int]:
    return [token.id for delta in deltas if delta.choice == choice for token in delta.tokens]


def text(deltas: list[Delta], choice: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.choice == choice)


def alone(serving: Serving, job: Job) -> Generation:
    """The same request on an engine of its own."""
    engine = serving.loaded.engine(serving.loaded.room(CONTEXT))
    generation = Generation(engine, serving.tokenizer, job.request, job.stops)
    list(generation)
    return generation


async def test_sixty_four_sessions_with_slow_readers_and_cancels_draw_what_each_draws_alone(tiny: Path) -> None:
    rng = random.Random(1)
    facts: list[Fact] = []
    async with started(tiny, blocks=20, running=8, listener=facts.append) as serving:
        base = prompt(serving, rng, 200)
        jobs = []
        for seed in range(64):
            own = prompt(serving, rng, rng.randint(1, 60))
            request = Request((*base[: rng.choice((0, 70, 200))], *own), rng.randint(1, 80), replace(WARM, seed=seed))
            jobs.append(Job(replace(request, priority=rng.randint(0, 2))))

        async def client(job: Job) -> list[Delta] | None:
            await asyncio.sleep(rng.random() * 0.5)
            session = serving.submit(job)
            if rng.random() < 0.3:
                asyncio.get_running_loop().call_later(rng.random() * 0.3, session.cancel)
            slow = rng.random() < 0.3
            return await read(session, (lambda: asyncio.sleep(0.005)) if slow else None)

        answers = await asyncio.gather(*map(client, jobs))
        cancelled = 0
        for job, deltas in zip(jobs, answers, strict=True):
            assert deltas is not None
            expected = alone(serving, job).result()
            assert tokens(deltas) == expected.tokens[: len(tokens(deltas))]
            if deltas[-1].finish_reason is FinishReason.CANCELLED:
                cancelled += 1
            else:
                assert text(deltas) == expected.text
                assert deltas[-1].finish_reason is expected.finish_reason
        assert cancelled > 3
        await serving.check()
    done = [fact for fact in facts if isinstance(fact, RequestDone)]
    steps = [fact for fact in facts if isinstance(fact, StepDone)]
    matched = [fact for fact in facts if isinstance(fact, Matched)]
    assert len(done) == 64
    assert sum(step.drawn for step in steps) == sum(choice.new_tokens for fact in done for choice in fact.choices)
    assert sum(step.preempted for step in steps) > 0
    assert sum(fact.cached for fact in matched if fact.cause is Cause.PROMPT) > 1000


async def test_a_reader_who_does_not_read_keeps_nobody_waiting(tiny: Path) -> None:
    async with started(tiny) as serving:
        rng = random.Random(2)
        idle = serving.submit(Job(Request(prompt(serving, rng, 30), 300, replace(WARM, seed=1))))
        other = Job(Request(prompt(serving, rng, 30), 20, replace(WARM, seed=2)))
        assert tokens(await read(serving.submit(other))) == alone(serving, other).result().tokens
        while serving.load().running:
            await asyncio.sleep(0.01)
        deltas = await read(idle)
        assert len(tokens(deltas)) == idle.new_tokens
        assert tokens(deltas) == alone(serving, idle.job).result().tokens


async def test_the_second_request_reads_what_the_first_computed(tiny: Path) -> None:
    async with started(tiny) as serving:
        job = Job(Request(prompt(serving, random.Random(3), 200), 5))
        first, second = serving.submit(job), None
        await read(first)
        second = serving.submit(job)
        deltas = await read(second)
        assert (first.cached_tokens, second.cached_tokens) == (0, 199)
        assert tokens(deltas) == alone(serving, job).result().tokens


async def test_choices_have_their_own_seeds_and_share_the_prompt(tiny: Path) -> None:
    facts: list[Fact] = []
    async with started(tiny, listener=facts.append) as serving:
        job = Job(Request(prompt(serving, random.Random(4), 90), 12, replace(WARM, seed=5)), choices=3)
        session = serving.submit(job)
        deltas = await read(session)
        for choice in range(3):
            seeded = replace(job.request, sampling=replace(WARM, seed=5 + choice))
            assert tokens(deltas, choice) == alone(serving, Job(seeded)).result().tokens
        assert session.new_tokens == sum(len(tokens(deltas, choice)) for choice in range(3))
    causes = [(fact.cause, fact.cached) for fact in facts if isinstance(fact, Matched)]
    assert sorted(causes) == [(Cause.FORK, 90), (Cause.FORK, 90), (Cause.PROMPT, 0)]


async def test_a_stop_string_ends_a_session_at_once(tiny: Path) -> None:
    async with started(tiny) as serving:
        request = Request(prompt(serving, random.Random(6), 20), 200, replace(WARM, seed=3))
        whole = alone(serving, Job(request)).result().text
        stop = whole[20:24]
        deltas = await read(serving.submit(Job(request, stops=(stop,))))
        assert text(deltas) == whole[: whole.find(stop)]
        assert (deltas[-1].finish_reason, deltas[-1].stop) == (FinishReason.STOP, stop)


async def test_log_probabilities_come_with_the_tokens_and_the_prompt(tiny: Path) -> None:
    async with started(tiny) as serving:
        request = Request(prompt(serving, random.Random(7), 70), 4, logprobs=2, prompt_logprobs=1)
        session = serving.submit(Job(request))
        deltas = await read(session)
        assert len(session.prompt_logprobs) == 70
        assert session.prompt_logprobs[0] is None
        for delta in deltas:
            for token in delta.tokens:
                assert token.logprobs is not None
                assert token.logprobs.top[0] == (token.id, token.logprobs.logprob)  # greedy
        scored = serving.submit(Job(Request(request.prompt, 0, prompt_logprobs=1)))
        deltas = await read(scored)
        assert [delta.finish_reason for delta in deltas] == [FinishReason.LENGTH]
        assert scored.prompt_logprobs == session.prompt_logprobs


async def test_embeddings_have_unit_length_and_do_not_depend_on_company(tiny: Path) -> None:
    async with started(tiny) as serving:
        rng = random.Random(8)
        prompts = [prompt(serving, rng, length) for length in (1, 40, 150)]
        together = await serving.embed(prompts)
        apart = [(await serving.embed([one]))[0] for one in prompts]
        assert together == apart
        assert [math.hypot(*vector) for vector in together] == pytest.approx([1.0] * 3)
        assert len(together[0]) == serving.loaded.config.hidden_size


async def test_what_can_never_run_is_refused_at_once_with_numbers(tiny: Path) -> None:
    async with started(tiny, blocks=4) as serving:
        assert serving.context == 256
        with pytest.raises(ContextError, match=r"may come to 300 tokens and 256 fit"):
            serving.submit(Job(Request((1,) * 200, 101)))
        with pytest.raises(ContextError, match=f"prompt is too long: 5000 tokens > {CONTEXT} maximum"):
            serving.submit(Job(Request((1,) * 5000, 1)))
        with pytest.raises(RequestError, match="logit_bias names token"):
            serving.submit(Job(Request((1,), 1, Sampling(logit_bias=((10**6, 1.0),)))))
        with pytest.raises(RequestError, match="choices"):
            serving.submit(Job(Request((1,), 1), choices=100))


async def test_a_full_queue_refuses_and_says_when_to_come_again(tiny: Path) -> None:
    async with started(tiny, running=1, max_waiting=3) as serving:
        jobs = [Job(Request((1, 2), 400, replace(WARM, seed=seed))) for seed in range(5)]
        sessions = [serving.submit(job) for job in jobs[:3]]
        with pytest.raises(Overloaded, match="3 requests wait already") as refusal:
            sessions.extend(map(serving.submit, jobs[3:]))
        assert refusal.value.retry_after >= 1
        assert len(sessions) in (3, 4)
        for session in sessions:
            session.cancel()
            session.cancel()
        assert {(await read(session))[-1].finish_reason for session in sessions} <= {
            FinishReason.CANCELLED,
            FinishReason.LENGTH,
            FinishReason.STOP,
        }


async def test_a_request_that_takes_too_long_fails_with_what_it_has(tiny: Path) -> None:
    async with started(tiny, timeout=0.05) as serving:
        deltas = await read(serving.submit(Job(Request((1, 2, 3), CONTEXT - 3, replace(WARM, seed=1)))))
        assert isinstance(deltas[-1].error, TimedOut)
        assert deltas[-1].finish_reason is FinishReason.FAILED


async def test_stopping_lets_what_runs_end_and_refuses_the_rest(tiny: Path) -> None:
    serving = open_serving(tiny, running=1)
    serving.start()
    running = serving.submit(Job(Request((1, 2, 3), 60, replace(WARM, seed=1))))
    waiting = serving.submit(Job(Request((1, 2, 4), 60, replace(WARM, seed=1))))
    while not serving.load().running:
        await asyncio.sleep(0.001)
    stopped = asyncio.create_task(serving.stop(30))
    answers = await asyncio.gather(read(running), read(waiting))
    await stopped
    assert tokens(answers[0]) == alone(serving, running.job).result().tokens
    assert isinstance(answers[1][-1].error, Stopping)
    with pytest.raises(Stopping):
        serving.submit(Job(Request((1,), 1)))


async def test_stopping_ends_what_does_not_end_in_time(tiny: Path) -> None:
    serving = open_serving(tiny)
    serving.start()
    session = serving.submit(Job(Request((1, 2, 3), CONTEXT - 3, replace(WARM, seed=1))))
    async for _ in session:
        break
    started_at = time.perf_counter()
    other = serving.submit(Job(Request((1, 2, 3), CONTEXT - 3, replace(WARM, seed=2))))
    await serving.stop(0)
    assert time.perf_counter() - started_at < 5
    assert isinstance((await read(other))[-1].error, Stopping)


async def test_numbers_that_are_not_finite_fail_their_request(tiny: Path) -> None:
    async with started(tiny) as serving:
        serving.loaded.model.embed.weight.data[7] = math.nan
        # The head is the embedding itself, so every row of logits has the damaged token in it.
        deltas = await read(serving.submit(Job(Request((7, 3, 9), 3))))
        assert isinstance(deltas[-1].error, NumericsError)
        assert (deltas[-1].finish_reason, text(deltas)) == (FinishReason.FAILED, "")


async def test_a_defect_in_a_step_ends_its_requests_and_the_thread_goes_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny) as serving:
        run = serving._engine.runner.run
        monkeypatch.setattr(serving._engine.runner, "run", lambda works: 1 / 0)
        deltas = await read(serving.submit(Job(Request((1, 2, 3), 3))))
        assert isinstance(deltas[-1].error, KvistError)
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.setattr(serving._engine.runner, "run", run)
        assert len(tokens(await read(serving.submit(Job(Request((1, 2, 3), 3)))))) == 3


async def test_a_thread_that_fails_is_not_alive_and_says_so(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny) as serving:

        def damaged() -> None:
            raise AssertionError("inconsistent")

        monkeypatch.setattr(serving._engine.runner, "run", lambda works: 1 / 0)
        monkeypatch.setattr(serving._engine, "check", damaged)
        deltas = await read(serving.submit(Job(Request((1, 2, 3), 3))))
        assert deltas[-1].error is not None
        while serving.alive:
            await asyncio.sleep(0.01)
        with pytest.raises(Stopping, match="the engine has failed"):
            serving.submit(Job(Request((1, 2, 3), 3)))


async def test_a_defect_on_the_way_to_a_reader_ends_that_answer_alone(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny) as serving:
        good, bad = Job(Request((1, 2, 3), 5)), Job(Request((1, 2, 4), 5), stops=("never",))
        monkeypatch.setattr("kvist.text.stops.StopMatcher.push", lambda self, text: 1 / 0 if self._patterns else text)
        answers = await asyncio.gather(*(read(serving.submit(job)) for job in (good, bad)))
        assert tokens(answers[0]) == alone(serving, good).result().tokens
        assert (answers[1][-1].finish_reason, text(answers[1])) == (FinishReason.FAILED, "")
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("defect", ["plan", "advance"])
async def test_a_defect_before_a_step_is_no_endless_one(
    tiny: Path, defect: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(tiny) as serving:
        with monkeypatch.context() as patched:
            owner = serving._engine.scheduler if defect == "plan" else serving._engine.keeper
            patched.setattr(owner, defect, lambda *_: 1 / 0)
            deltas = await read(serving.submit(Job(Request((1, 2, 3), 3))))
            assert deltas[-1].finish_reason is FinishReason.FAILED
        assert caplog.text.count("ZeroDivisionError: ") == 1
        assert len(tokens(await read(serving.submit(Job(Request((1, 2, 3), 3)))))) == 3


async def test_a_pool_of_one_request_serves_it_again_and_again_and_in_choices(tiny: Path) -> None:
    async with started(tiny, blocks=3) as serving:
        request = Request(prompt(serving, random.Random(9), 150), 43, replace(WARM, seed=1))
        expected = alone(serving, Job(request)).result().tokens
        for choices in (1, 1, 3):
            session = serving.submit(Job(request, choices=choices))
            assert tokens(await asyncio.wait_for(read(session), 60)) == expected
        together = [read(serving.submit(Job(request))) for _ in range(3)]
        assert [tokens(one) for one in await asyncio.wait_for(asyncio.gather(*together), 60)] == [expected] * 3


async def test_an_engine_that_gets_nothing_done_is_in_trouble(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(tiny) as serving:
        assert serving.trouble is None
        seconds = itertools.count()
        serving._watch = Watch(lambda: float(next(seconds)))
        with monkeypatch.context() as patched:
            patched.setattr(serving._engine, "step", list)
            session = serving.submit(Job(Request((1, 2, 3), 3)))
            while serving.trouble is None:
                await asyncio.sleep(0.001)
            assert "has got nothing done for" in serving.trouble
        assert len(tokens(await read(session))) == 3
        while serving.trouble is not None:
            await asyncio.sleep(0.001)


def test_a_long_step_is_no_trouble_until_it_is_too_long() -> None:
    now = 0.0
    watch = Watch(lambda: now)
    watch.begin()
    now += LONGEST
    assert watch.trouble() is None
    now += 1
    assert watch.trouble() == "the engine has been in one step for 901 s"
    watch.end(True)
    now += 1e6  # nothing to do for long
    assert watch.trouble() is None


def test_steps_that_get_nothing_done_add_up_and_one_that_does_makes_up_for_them() -> None:
    now = 0.0
    watch = Watch(lambda: now)
    for _ in range(31):
        assert watch.trouble() is None
        watch.begin()
        now += 1
        watch.end(False)
    assert watch.trouble() == "the engine has work and has got nothing done for 31 s; the log may say why"
    watch.begin()
    assert watch.trouble() is not None, "the next one under way is no progress yet"
    watch.end(True)
    assert watch.trouble() is None
