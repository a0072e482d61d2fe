"""What one client sends to harm the others: it is refused in a line, or worked on beside the event loop."""

import asyncio
import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastapi
import httpx
import pytest
from attacks import Attack, attacks

from kvist.base.errors import Overloaded, RequestError
from kvist.server.app import create_app
from kvist.server.connections import BACKLOG, most_connections
from kvist.server.limits import _has_more_values
from kvist.server.openai import rerank
from kvist.server.openai.chat_schema import ChatBody
from kvist.server.settings import ServerSettings
from kvist.server.turns import Turns
from kvist.service.aside import THREAD_NAME, Aside
from kvist.text.schema_cost import MOST_DIVISOR, MOST_OPTIONAL, MOST_PARTS, check_cost
from kvist.text.template_process import TemplateProcess
from live import Live, answer_of, exchange, live
from tiny_model import open_serving

SIZE = 1 << 20
JSON = {"content-type": "application/json"}
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


QUICK = [attack for attack in attacks(SIZE) if attack.name != "many embeddings"]  # which are told of below


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.name)
def test_it_is_answered_as_it_should_be(live_server: Live, attack: Attack) -> None:
    answer = httpx.post(f"{live_server.url}{attack.path}", content=attack.body, headers=JSON, timeout=60)
    assert answer.status_code in attack.statuses, answer.text
    if answer.status_code >= 400:
        assert 0 < len(answer.json()["error"]["message"]) < 400


def test_what_takes_long_is_not_done_on_the_event_loop(tiny_model: Path) -> None:
    settings, serving = ServerSettings(), open_serving(tiny_model)

    def threads(server: Live, path: str, request: dict[str, Any] | None, name: str, of: Any) -> list[str]:
        """On which a function was called for a request."""
        where, inner = list[str](), getattr(of, name)

        def call(*args: Any, **named: Any) -> Any:
            where.append(threading.current_thread().name)
            return inner(*args, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of, name, call)
            if request is None:
                httpx.get(f"{server.url}{path}", timeout=60)
            else:
                httpx.post(f"{server.url}{path}", json={"model": "tiny", **request}, timeout=60)
        return where

    text, schema = "a twig " * 1400, {"type": "object", "properties": {"a": {"type": "integer"}}}
    message = {"role": "user", "content": "a"}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked: list[tuple[str, dict[str, Any], str, Any]] = [
        ("/v1/completions", {"prompt": text}, "encode", serving.tokenizer),
        ("/v1/embeddings", {"input": [text]}, "encode", serving.tokenizer),
        ("/tokenize", {"prompt": text}, "encode", serving.tokenizer),
        ("/v1/messages/count_tokens", {"messages": [{**message, "content": text}]}, "encode", serving.tokenizer),
        ("/v1/chat/completions", {"messages": [message] * 200}, "render", serving.template),
        ("/v1/chat/completions", {"messages": [message], "response_format": form}, "json_schema", serving.grammars),
        ("/v1/responses", {"input": text}, "render", serving.template),
    ]
    with live(create_app(serving, settings), serving, settings) as server:
        for path, request, name, of in asked:
            where = threads(server, path, request, name, of)
            assert where, f"{path} did not come to {name}"
            assert all(thread.startswith(THREAD_NAME) for thread in where), f"{path}: {where}"
        # What texts stand in lists, and what is asked without a body.
        for path, request, name, of in (
            ("/v1/rerank", {"query": "a", "documents": [text]}, "encode", serving.tokenizer),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}, "_dot", rerank),
            ("/completion", {"prompt": text, "n_predict": 1}, "encode", serving.tokenizer),
            ("/completion", {"prompt": [1, 2], "n_predict": 1, "logit_bias": [[text, 1]]}, "encode", serving.tokenizer),
            ("/completion", {"prompt": [1, 2], "n_predict": 1}, "decode", serving.tokenizer),
            ("/apply-template", {"messages": [message]}, "render", serving.template),
            ("/detokenize", {"tokens": [1, 2]}, "decode", serving.tokenizer),
            ("/api/embed", {"input": text}, "encode", serving.tokenizer),
            ("/api/generate", {"prompt": text, "raw": True}, "encode", serving.tokenizer),
            ("/v1/messages/count_tokens", {"messages": [{**message, "content": text}]}, "render", serving.template),
        ):
            where = threads(server, path, request, name, of)
            assert where, f"{path} did not come to {name}"
            assert where[0].startswith(THREAD_NAME), f"{path}: {where}"
        short = {"messages": [message], "max_tokens": 1}
        where = threads(server, "/v1/chat/completions", short, "render", serving.template)
        assert where == [server.thread.name], "what is short is done at once"
        where = threads(server, "/v1/cache/tax", None, "encode", serving.tokenizer)
        assert where, "the parts of the last prompt are counted"
        assert all(thread.startswith(THREAD_NAME) for thread in where), where
        assert serving.template is not None
        idle = serving.template._process._idle
        there = [idle.pop() for _ in range(len(idle))]
        where = threads(server, "/v1/chat/completions", short, "_started", TemplateProcess)
        idle += there
        assert where, "a process was started"
        assert all(thread.startswith(THREAD_NAME) for thread in where)


def test_the_description_is_made_once_and_not_on_the_event_loop(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, inner = list[str](), fastapi.applications.get_openapi

    def describe(**given: Any) -> dict[str, Any]:
        made.append(threading.current_thread().name)
        return inner(**given)

    monkeypatch.setattr(fastapi.applications, "get_openapi", describe)
    with few_connections(tiny_model, 100) as server, ThreadPoolExecutor(4) as clients:
        paths = ["/docs", "/openapi.json"] * 4
        answers = list(clients.map(lambda path: httpx.get(f"{server.url}{path}", timeout=60), paths))
        assert {answer.status_code for answer in answers} == {200}
        assert len(made) == 1
        assert made[0] != server.thread.name


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(
    live_server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, context = live_server.serving.tokenizer, live_server.serving.context
    longest = max(len(tokenizer.token_bytes(index)) for index in range(tokenizer.vocab_size))
    text = "a" * ((context + 1) * longest)
    assert tokenizer.fewest_tokens(text) == context + 1 <= len(tokenizer.encode(text))
    monkeypatch.setattr(tokenizer, "encode", lambda text, add_special=True: 1 // 0)
    refused = httpx.post(f"{live_server.url}/v1/completions", json={"prompt": text}, timeout=60)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"prompt is too long: {context + 1} tokens > {context} maximum" in error["message"]


# ---- work beside the loop


def test_a_tenant_has_its_share_of_the_threads_and_others_theirs() -> None:
    async def main() -> None:
        aside, go, under_way = Aside(), threading.Event(), threading.Semaphore(0)

        def work() -> int:
            under_way.release()
            go.wait(20)
            return 1

        greedy = [asyncio.create_task(aside.run("greedy", work)) for _ in range(66)]
        for _ in range(2):
            await asyncio.to_thread(under_way.acquire, timeout=20)
        with pytest.raises(Overloaded, match="too many long requests of yours"):
            await aside.run("greedy", work)
        assert await aside.run("other", lambda: 7) == 7, "another's turn comes while that tenant's work is under way"
        assert not under_way.acquire(blocking=False), "no more of it has begun"
        for task in greedy[2:40]:
            task.cancel()  # who leaves makes room
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(*greedy[:2], *greedy[40:]) == [1] * 28
        aside.close()

    asyncio.run(main())


def test_work_that_takes_too_long_is_given_up_and_keeps_its_place() -> None:
    async def main() -> None:
        aside, go = Aside(seconds=0.05), threading.Event()
        for _ in range(2):
            with pytest.raises(RequestError, match=r"takes longer than 0\.05 s"):
                await aside.run("a", lambda: go.wait(20))
        waiting = asyncio.create_task(aside.run("a", lambda: 3))
        assert await aside.run("b", lambda: 4) == 4
        await asyncio.sleep(0)
        assert not waiting.done()
        go.set()
        assert await waiting == 3
        with pytest.raises(ZeroDivisionError):
            await aside.run("a", lambda: 1 // 0)
        aside.close()

    asyncio.run(main())


def test_long_bodies_take_turns_and_others_have_as_long_in_between() -> None:
    async def main() -> None:
        turns, spans = Turns(), list[tuple[float, float]]()

        async def read() -> None:
            await turns.wait()
            began = time.monotonic()
            time.sleep(0.05)  # the event loop is held
            spans.append((began, time.monotonic()))

        tasks = [asyncio.create_task(read()) for _ in range(4)]
        await asyncio.sleep(0.01)
        tasks[2].cancel()  # whoever leaves while it waits takes no turn with it
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(spans) == 3
        assert all(after[0] - before[1] >= 0.045 for before, after in itertools.pairwise(spans))

    asyncio.run(asyncio.wait_for(main(), 30))


# ---- bodies


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2, {"b": "c"}], "d": None},
        ["a,b,[{" * 50, 'say \\"no\\", [', "\\"],
        [[[]]] * 5,
        list(range(40)),
        {"text": "a, b" * 1000},
        [0.5, 1e300, -2.5e-7, True, False, None, {"a": 1.0, "b": "1.5e3"}],
    ],
)
def test_values_are_counted_and_what_stands_in_texts_is_not(value: Any) -> None:
    def weight(value: Any) -> int:
        """In eighths of a value."""
        if isinstance(value, dict):
            return 8 + sum(8 + weight(item) for item in value.values()) + max(len(value) - 1, 0)
        if isinstance(value, list):
            return 8 + sum(map(weight, value)) + max(len(value) - 1, 0)
        if isinstance(value, float):
            return 8 * sum(map(json.dumps(value).count, ".e"))
        return 8 * isinstance(value, str | bool)

    body, most = json.dumps(value).encode(), -(-weight(value) // 8)
    assert not _has_more_values(body, most)
    assert _has_more_values(body, most - 1)


def test_of_a_long_list_of_mistakes_one_is_told() -> None:
    with pytest.raises(ValueError) as caught:
        ChatBody.model_validate({"messages": [{}] * 1000})
    assert caught.value.error_count() < 10  # type: ignore[attr-defined]
    with pytest.raises(ValueError) as caught:
        ChatBody.model_validate({"messages": [{"role": "user", "content": [7] * 1000}]})
    assert caught.value.error_count() < 10  # type: ignore[attr-defined]


def test_schemas_that_take_too_long_are_told_before_they_are_compiled() -> None:
    def properties(count: int) -> dict[str, Any]:
        return {f"p{index}": {} for index in range(count)}

    check_cost({"properties": properties(MOST_OPTIONAL)})
    check_cost({"properties": properties(MOST_OPTIONAL + 9), "required": [f"p{index}" for index in range(9)]})
    check_cost({"multipleOf": MOST_DIVISOR, "items": [{"multipleOf": 0.01}, {"multipleOf": float("inf")}]})
    for wrong, said in (
        ({"items": {"properties": properties(MOST_OPTIONAL + 1)}}, "2001 properties that are not required"),
        ({"properties": properties(MOST_OPTIONAL + 1), "required": 5}, "2001 properties"),
        ({"anyOf": [{"multipleOf": MOST_DIVISOR + 1}]}, "multipleOf 10001,"),
        ({"multipleOf": 1.23456}, r"multipleOf 1\.23456,"),
        ({"multipleOf": 1e300}, r"multipleOf 1e\+300,"),
        ({"enum": [0] * MOST_PARTS}, "too large"),
    ):
        with pytest.raises(RequestError, match=said):
            check_cost(wrong)


# ---- connections


@contextlib.contextmanager
def few_connections(model: Path, most: int, **settings: Any) -> Iterator[Live]:
    told = ServerSettings(max_connections=most, **settings)
    serving = open_serving(model)
    with live(create_app(serving, told), serving, told) as server:
        yield server


def test_those_who_say_nothing_make_room_for_those_who_ask(tiny_model: Path) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with few_connections(tiny_model, 8) as server, contextlib.ExitStack() as stack:

        def connect(sent: bytes = b"") -> socket.socket:
            made = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=20))
            made.sendall(sent)
            return made

        body = json.dumps({"prompt": "a", "max_tokens": 1500, "stream": True, "ignore_eos": True}).encode()
        asking = connect(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert asking.recv(15) == b"HTTP/1.1 200 OK"
        silent = [connect(sent) for sent in (b"", b"GET /hea", head + b"content-length: 9\r\n\r\n{") * 20]
        for _ in range(3):
            assert answer_of(exchange(server.port, HEALTH))[0] == 200
        assert len(server.server.server_state.connections) <= 8
        assert silent[0].recv(1) == b"", "the first of them was ended"
        assert asking.recv(1), "who waits for an answer was not"


def test_whoever_comes_while_the_server_is_busy_need_not_try_again(tiny_model: Path) -> None:
    """Past the kernel's queue a connection is dropped, and tried again after a second."""
    with few_connections(tiny_model, 500) as server, contextlib.ExitStack() as stack:
        go = threading.Event()
        stack.callback(go.set)
        server.loop.call_soon_threadsafe(go.wait, 60)
        for _ in range(6 * BACKLOG):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=0.9))
        go.set()
        assert answer_of(exchange(server.port, HEALTH))[0] == 200


def test_a_head_has_its_time_however_it_trickles(tiny_model: Path) -> None:
    with few_connections(tiny_model, 8, head_timeout=0.3) as server:
        assert exchange(server.port, b"") == b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            start = time.monotonic()
            with contextlib.suppress(OSError):
                for byte in HEALTH * 100:
                    connection.sendall(bytes([byte])) if byte != 10 else None
                    time.sleep(0.02)
            assert time.monotonic() - start < 15
        # A connection that is used has the time anew for each request, and none runs while it is answered.
        with httpx.Client(base_url=server.url) as client:
            for _ in range(4):
                assert client.get("/health").status_code == 200
                time.sleep(0.1)


def test_connections_stay_beneath_what_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda what: (256, 4096))
    assert most_connections(1024) == 128
    assert most_connections(50) == 50
    monkeypatch.setattr("resource.getrlimit", lambda what: (-1, -1))
    assert most_connections(1024) == 1024


# ---- embeddings


def test_embeddings_are_let_in_whole_or_not_at_all(tiny_model: Path) -> None:
    serving = open_serving(tiny_model, running=2, max_waiting=3)

    async def main() -> None:
        serving.start()
        try:
            prompts = [[index % 7 + 1, 2, 3] for index in range(300)]
            whole = await serving.embed(prompts)
            assert len(whole) == 300
            assert whole[:7] == [(await serving.embed([prompt]))[0] for prompt in prompts[:7]]
            full = serving._max_waiting
            serving._max_waiting = 1
            with pytest.raises(Overloaded):
                await serving.embed(prompts)
            load = serving.load()
            assert (load.running, load.waiting) == (0, 0), "nothing of what was refused is left to run"
            serving._max_waiting = full
            with pytest.raises(RequestError):
                await serving.embed([*prompts, [1] * 10**5])
            assert serving.load().waiting == 0
            leaving = asyncio.create_task(serving.embed(prompts))
            await asyncio.sleep(0.01)
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leaving
            while serving.load().running or serving.load().waiting:
                await asyncio.sleep(0.01)
            await serving.check()
        finally:
            await serving.stop(0)

    asyncio.run(asyncio.wait_for(main(), 60))
