"""Requests that wait, are put off, cancelled or overtaken by others: what is said of them adds up."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvist.runtime.request import Request
from kvist.service.explanation import CONTINUED, KEPT, NEW, UNFINISHED, Explanation
from kvist.service.serving import Serving
from kvist.service.session import Job, Session
from tiny_model import open_serving, write_tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("explained") / "tiny")


@asynccontextmanager
async def started(directory: Path, **options: int) -> AsyncIterator[Serving]:
    serving = open_serving(directory, **options)
    serving.start()
    try:
        yield serving
    finally:
        await serving.stop(0)


def tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(300) for _ in range(count))


async def read(session: Session) -> Explanation | None:
    async for _ in session:
        pass
    return session.explanation


def check_sums(found: Explanation) -> None:
    assert sum(found.cached.values()) == found.prompt_tokens - found.computed
    assert 0 < found.computed <= found.prompt_tokens
    assert found.again is None or 0 <= found.again <= found.computed


async def test_tokens_add_up_of_those_that_wait_for_room_and_are_put_off(tiny: Path) -> None:
    rng = random.Random(1)
    base, noted, waited = tokens(rng, 500), 0, 0
    async with started(tiny, blocks=16) as serving:
        await read(serving.submit(Job(Request(base, 2))))
        first = serving.submit(Job(Request(tokens(rng, 300), 200)))
        await asyncio.sleep(0.05)
        rest = [serving.submit(Job(Request(base + tokens(rng, 100), 300))) for _ in range(3)]
        for session in (first, *rest):
            found = await read(session)
            assert found is not None
            check_sums(found)
            assert session.cached_tokens == found.prompt_tokens - found.computed
            noted += found.note is not None
            waited += sum(found.cached.values()) >= 384
        assert noted == serving._engine.scheduler.preemptions > 0
        assert waited > 0


async def test_what_a_sequence_loses_of_its_own_is_no_reason(tiny: Path) -> None:
    rng = random.Random(2)
    async with started(tiny, blocks=16) as serving:
        sessions = [serving.submit(Job(Request(tokens(rng, 200), 400))) for _ in range(4)]
        for session in sessions:
            found = await read(session)
            assert found is not None
            assert (found.reason, found.cached) == (NEW, {})
        assert serving._engine.scheduler.preemptions > 0


async def test_a_request_that_was_cancelled_in_time_is_compared_with_nothing(tiny: Path) -> None:
    prompt = tokens(random.Random(3), 1800)
    async with started(tiny) as serving:
        session = serving.submit(Job(Request(prompt, 4)))
        session.name("gone")
        session.cancel()
        assert await read(session) is None
        assert serving.explainer.told("", "gone") is None
        found = await read(serving.submit(Job(Request(prompt, 4))))
        assert found is not None
        assert (found.reason, found.nearest, found.again) == (NEW, None, None)
        found = await read(serving.submit(Job(Request(prompt, 4))))
        assert found is not None
        assert (found.reason, found.computed) == (CONTINUED, 1)


async def test_a_request_that_overtakes_is_not_said_to_have_lost_anything(tiny: Path) -> None:
    rng = random.Random(4)
    prompt = tokens(rng, 600)
    async with started(tiny, running=1) as serving:
        holder = serving.submit(Job(Request(tokens(rng, 100), 60)))
        patient = serving.submit(Job(Request(prompt, 3, priority=2)))
        urgent = serving.submit(Job(Request(prompt, 3, priority=1)))
        _, slow, quick = [await read(session) for session in (holder, patient, urgent)]
        assert quick is not None
        assert slow is not None
        assert (quick.reason, quick.computed) == (UNFINISHED, 600)
        assert (slow.reason, slow.computed) == (KEPT, 1)


async def test_an_answer_without_tokens_counts_as_computed(tiny: Path) -> None:
    prompt = tokens(random.Random(5), 300)
    async with started(tiny) as serving:
        await read(serving.submit(Job(Request(prompt, 0, prompt_logprobs=0))))
        found = await read(serving.submit(Job(Request(prompt, 2))))
        assert found is not None
        assert (found.reason, found.computed, found.again) == (CONTINUED, 1, 0)
