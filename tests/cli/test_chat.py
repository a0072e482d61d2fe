"""`kvist chat`: against a server that is made for it, against a real one, and with a model in this process."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from command import Kvist, Outcome
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import write_tiny_model

USAGE = {"prompt_tokens": 1204, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1088}}


def chunk(finish: str | None = None, **delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None}


PLAIN = [chunk(content=""), chunk(content="Hel"), chunk(content="lo \x1b[31m"), chunk("stop")]
USED = {"choices": [], "usage": USAGE}


@dataclass
class Scripted:
    """A server that answers what it is told to, and keeps what it was asked."""

    events: list[dict[str, Any] | str] = field(default_factory=list)
    refusal: Response | None = None
    endless: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    async def stop(self, grace: float) -> None:
        pass

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"data": [{"id": "first"}, {"id": "second"}]}

        @app.post("/v1/chat/completions", response_model=None)
        async def completions(request: Request) -> Response:
            self.asked.append(await request.json())
            self.headers.append(dict(request.headers))
            return self.refusal or StreamingResponse(self.stream(), media_type="text/event-stream")

        return app

    async def stream(self) -> AsyncIterator[str]:
        import asyncio

        try:
            yield ": a comment\n\n"
            for event in self.events:
                yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
            while self.endless:
                await asyncio.sleep(0.02)
                yield f"data: {json.dumps(chunk(content='on '))}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.left.set()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    scripted = Scripted()
    with live(scripted.app(), scripted, ServerSettings()) as running:
        yield running


@pytest.fixture
def scripted(server: Live) -> Scripted:
    """The server's script, as if nothing had happened."""
    script: Scripted = server.serving
    script.events, script.refusal, script.endless = [*PLAIN, USED], None, False
    script.asked.clear()
    script.headers.clear()
    script.left.clear()
    return script


def failed(outcome: Outcome, *said: str) -> None:
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("kvist: ")
    assert outcome.err.count("\n") == 1
    for text in said:
        assert text in outcome.err


def test_one_message_to_a_server(kvist: Kvist, server: Live, scripted: Scripted) -> None:
    outcome = kvist("chat", "--url", server.url, "-p", "Hi", "--system", "Be brief.", "--max-tokens", 9, "--seed", 3)
    # Piped, the answer is all there is, as it came.
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello \x1b[31m\n", "")
    assert scripted.asked == [
        {
            "model": "first",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 9,
            "seed": 3,
        }
    ]
    assert "authorization" not in scripted.headers[0]


def test_json_says_what_it_took(kvist: Kvist, server: Live, scripted: Scripted) -> None:
    scripted.events = [chunk(reasoning_content="Hm", reasoning="Hm"), chunk(content="Yes"), chunk("length"), USED]
    options = ("--url", f"{server.url}/v1/", "--model", "second", "--temperature", 0)
    outcome = kvist("chat", *options, "-p", "Hi", "--json")
    assert outcome.out.count("\n") == 1
    answer = json.loads(outcome.out)
    timings = answer.pop("timings")
    assert answer == {
        "model": "second",
        "text": "Yes",
        "reasoning": "Hm",
        "finish_reason": "length",
        "prompt_tokens": 1204,
        "cached_tokens": 1088,
        "new_tokens": 5,
    }
    assert timings["first_token_s"] > 0
    assert timings["decode_tokens_per_s"] > 0
    assert (scripted.asked[0]["model"], scripted.asked[0]["temperature"]) == ("second", 0)


def test_the_key_comes_from_the_environment(
    kvist: Kvist, server: Live, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVIST_API_KEY", "secret")
    kvist("chat", "--url", server.url, "-p", "Hi")
    assert scripted.headers[0]["authorization"] == "Bearer secret"


def test_each_line_goes_on_with_the_conversation(
    kvist: Kvist, server: Live, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.events = [chunk(content="Yes"), chunk("stop")]
    lines = iter(["one", "", "two", "/what", "/clear", "three", "/quit", "four"])
    monkeypatch.setattr("builtins.input", lambda sign: next(lines))
    outcome = kvist("chat", "--url", server.url, "--system", "S")
    assert outcome.out == "Yes\nYes\nYes\n"
    assert outcome.err == "there are /clear and /quit\n"
    said = [
        " ".join(f"{message['role'][0]}:{message['content']}" for message in ask["messages"]) for ask in scripted.asked
    ]
    assert said == ["s:S u:one", "s:S u:one a:Yes u:two", "s:S u:three"]


def test_what_a_server_refuses_ends_one_message_and_not_the_chat(
    kvist: Kvist, server: Live, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.refusal = JSONResponse({"error": {"message": "no such model"}}, 404)
    failed(kvist("chat", "--url", server.url, "-p", "Hi"), "the server refused: no such model")
    scripted.refusal = Response("<html>", 502)
    failed(kvist("chat", "--url", server.url, "-p", "Hi"), "the server refused: 502 Bad Gateway")
    scripted.asked.clear()
    lines = iter(["one", "two"])

    def read(sign: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    outcome = kvist("chat", "--url", server.url)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.count("kvist: the server refused: 502 Bad Gateway\n") == 2
    # A message without an answer was not said.
    assert [len(ask["messages"]) for ask in scripted.asked] == [1, 1]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([chunk(content="a"), {"error": {"message": "out of luck"}}], "the server failed: out of luck"),
        ([chunk(content="a"), {"error": "plain"}], "the server failed: plain"),
        ([chunk(content="a")], "ended in the middle"),
        (["{", "x"], "no stream of JSON events"),
    ],
)
def test_streams_that_go_wrong(
    kvist: Kvist, server: Live, scripted: Scripted, events: list[dict[str, Any] | str], said: str
) -> None:
    scripted.events = events
    outcome = kvist("chat", "--url", server.url, "-p", "Hi")
    assert outcome.code == 1
    assert outcome.err.startswith("kvist: ")
    assert said in outcome.err
    assert outcome.out in ("", "a\n")


def test_mistakes_are_said_in_one_line(kvist: Kvist) -> None:
    failed(kvist("chat", "--url", "http://127.0.0.1:9", "-p", "a"), "cannot reach http://127.0.0.1:9/v1/")
    failed(kvist("chat", "--url", "localhost:8000", "-p", "a"), "--url takes an address", "'localhost:8000'")
    failed(kvist("chat", "--url", "http://127.0.0.1:x", "-p", "a"), "--url or the API key cannot be used")
    failed(kvist("chat", "--json"), "--json needs a message")
    failed(kvist("chat", "somewhere", "--url", "http://127.0.0.1:9"), "with --url the server has the model")
    failed(kvist("chat", "--model", "x"), "needs --url")


class Terminal:
    """`kvist` on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvist", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern was shown; returns what came up to its end, and forgets it."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"{pattern!r} was not shown: {self.shown!r}"
            try:
                self.shown += os.read(self._master, 4096).decode()
            except OSError:
                raise AssertionError(f"it ended before {pattern!r} was shown: {self.shown!r}") from None
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def code(self) -> int:
        return self._process.wait(120)


def test_on_a_terminal_ctrl_c_ends_the_answer_and_not_the_chat(server: Live, scripted: Scripted) -> None:
    scripted.events, scripted.endless = [chunk(reasoning_content="Hm."), chunk(content="Well \x1b]0;\x07")], True
    with Terminal("chat", "--url", server.url) as terminal:
        terminal.until("> ")
        terminal.type("one\n")
        shown = terminal.until("on on on ")
        # Reasoning is dimmed; a control sequence of the model's has lost its teeth.
        assert "\x1b[2mHm.\x1b[0m\r\n\r\nWell ]0;on " in shown
        assert not scripted.left.is_set()
        terminal.interrupt()
        assert "stopped" in terminal.until("> ")
        assert scripted.left.wait(60), "the server still answers"
        scripted.endless, scripted.events = False, [*PLAIN, USED]
        terminal.type("two\n")
        assert "Hello" in terminal.until(r"1,204 prompt tokens, 1,088 cached · 5 new at [\d,.]+/s")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.code() == 0
    first, second = scripted.asked
    assert len(first["messages"]) == 1
    # What had come when it was stopped stays said.
    assert second["messages"][1]["content"].startswith("Well \x1b]0;\x07on on on ")
    assert second["messages"][2] == {"role": "user", "content": "two"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_model_in_this_process(kvist: Kvist, tiny: Path) -> None:
    options = ("chat", tiny, "-p", "What is a twig?", "--max-tokens", 12, "--seed", 5)
    outcome = kvist(*options, "--json")
    assert outcome.code == 0, outcome.err
    answer = json.loads(outcome.out)
    assert (answer["model"], answer["new_tokens"], answer["finish_reason"]) == ("tiny", 12, "length")
    assert answer["cached_tokens"] == 0
    assert answer["text"]
    assert kvist(*options).out == answer["text"] + "\n"


def test_a_conversation_in_this_process_reuses_its_cache(kvist: Kvist, tiny: Path) -> None:
    """On a terminal the line after each answer says how much of the prompt was cached."""
    with Terminal("chat", tiny, "--max-tokens", "8", "--seed", "5", "--system", "word " * 200) as terminal:
        cached = []
        for text in ("one", "two"):
            terminal.until("> ")
            terminal.type(f"{text}\n")
            line = terminal.until(r"([\d,]+) prompt tokens, ([\d,]+) cached · 8 new at")
            cached.append(int(line.rpartition(" cached")[0].rpartition(" ")[2].replace(",", "")))
        terminal.until("> ")
        terminal.type("/quit\n")
        assert terminal.code() == 0
    assert cached[0] == 0
    assert cached[1] >= 192


def test_without_a_template_there_is_no_chat(kvist: Kvist, model: Path) -> None:
    failed(kvist("chat", model, "-p", "a"), "chat template")


def test_asking_a_server_needs_no_torch(server: Live, scripted: Scripted) -> None:
    code = """
import sys
from kvist.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules, "torch was imported"
"""
    command = [sys.executable, "-c", code, "chat", "--url", server.url, "-p", "Hi"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("Hello \x1b[31m\n", "")
