"""Too long a prompt is told in the words by which clients know it, so that agents shorten a conversation and go on."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tiny_model import CONTEXT

LONG = "Once there was a small house at the edge of a wood, and nobody had lived in it for a long time. " * 100
MESSAGES: list[Any] = [{"role": "user", "content": LONG}]
OPENAI: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": LONG},
    "/v1/responses": {"input": LONG},
    "/v1/embeddings": {"input": ["short", LONG]},
}
STREAMS = {path: body | {"stream": True} for path, body in OPENAI.items() if "embeddings" not in path}
ANTHROPIC: dict[str, Any] = {"model": "any", "max_tokens": 10, "messages": MESSAGES}
NUMBERS = re.compile(r"prompt is too long: (\d+) tokens > (\d+) maximum")


# In processes of their own, as these packages keep sockets and settings.
LITELLM = """
import sys
import litellm
from litellm.exceptions import ContextWindowExceededError

url, text = sys.argv[1:]
for model, base in (("openai/tiny", f"{url}/v1"), ("hosted_vllm/tiny", f"{url}/v1"), ("anthropic/tiny", url)):
    for streams in (False, True):
        try:
            messages = [{"role": "user", "content": text}]
            litellm.completion(model, messages, api_base=base, api_key="none", stream=streams, max_tokens=10)
            sys.exit(f"{model} was answered")
        except ContextWindowExceededError:
            pass
print("ok")
"""
LANGCHAIN = """
import sys
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI

url, text = sys.argv[1:]
asked = {"model": "tiny", "api_key": "none", "max_retries": 0}
for chat in (
    ChatOpenAI(base_url=f"{url}/v1", **asked),
    ChatOpenAI(base_url=f"{url}/v1", use_responses_api=True, **asked),
    ChatAnthropic(base_url=url, **asked),
):
    for ask in (chat.invoke, lambda text: list(chat.stream(text))):
        try:
            ask(text)
            sys.exit(f"{chat} was answered")
        except ContextOverflowError:
            pass
print("ok")
"""


def contains(text: str) -> Callable[[str], bool]:
    return lambda told: text.lower() in told.lower()


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda told: re.search(pattern, told, re.IGNORECASE) is not None


# What clients look for, each in the text of the whole body.
FOR_OPENAI = {
    "litellm: openai": contains("this model's maximum context length is"),
    "litellm: any": contains("prompt is too long"),
    "langchain": contains("context_length_exceeded"),
    "a count": matches(r"maximum context length is (\d+) tokens"),
    "a code": lambda told: json.loads(told)["error"]["code"] == "context_length_exceeded",
}
FOR_ANTHROPIC = {
    "litellm, langchain": contains("prompt is too long"),
    "claude: numbers": matches(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)"),
    "a kind": lambda told: json.loads(told)["error"]["type"] == "invalid_request_error",
}


@pytest.mark.parametrize(("path", "body"), [*OPENAI.items(), *STREAMS.items()])
def test_openais_routes_say_it_as_clients_know_it(server_url: str, path: str, body: dict[str, Any]) -> None:
    response = httpx.post(server_url + path, json=body, timeout=60)
    assert response.status_code == 400
    assert [name for name, known in FOR_OPENAI.items() if not known(response.text)] == []
    found = NUMBERS.search(response.text)
    assert found is not None
    assert int(found[1]) > int(found[2])
    assert int(found[2]) in (CONTEXT - 1, CONTEXT)  # of which one is left for the answer, where there is one
    assert f"maximum context length is {CONTEXT} tokens" in response.text


@pytest.mark.parametrize("streams", [False, True])
def test_anthropics_route_says_it_as_clients_know_it(server_url: str, streams: bool) -> None:
    response = httpx.post(f"{server_url}/v1/messages", json=ANTHROPIC | {"stream": streams}, timeout=60)
    assert response.status_code == 400
    assert [name for name, known in FOR_ANTHROPIC.items() if not known(response.text)] == []
    counted = httpx.post(f"{server_url}/v1/messages/count_tokens", json=ANTHROPIC, timeout=60).json()["input_tokens"]
    assert response.json()["error"]["message"] == f"prompt is too long: {counted} tokens > {CONTEXT - 1} maximum"


def test_another_refusal_is_not_taken_for_it(server_url: str) -> None:
    for path, body in OPENAI.items():
        told = httpx.post(server_url + path, json=body | {"model": 3}, timeout=60)
        assert told.status_code == 400
        assert [name for name, known in FOR_OPENAI.items() if known(told.text)] == []
    told = httpx.post(f"{server_url}/v1/messages", json=ANTHROPIC | {"max_tokens": "a"}, timeout=60)
    assert [name for name, known in FOR_ANTHROPIC.items() if known(told.text)] == ["a kind"]


class Agent:
    """An agent as those are that speak to Claude: each turn adds to one conversation; one that has become too long is
    replaced by a summary of it, which the model writes itself, and the turn is asked once more."""

    def __init__(self, client: anthropic.Anthropic) -> None:
        self.messages: list[Any] = []
        self.compacted: list[tuple[int, int]] = []  # tokens of the prompt, and the most there may be
        self._client = client

    def turn(self, text: str) -> str:
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._ask(self.messages)
        except anthropic.BadRequestError as error:
            found = NUMBERS.search(error.message)
            if found is None:
                raise
            self.compacted.append((int(found[1]), int(found[2])))
            self._compact(keep=text, excess=int(found[1]) - int(found[2]))
            answer = self._ask(self.messages)
        self.messages.append({"role": "assistant", "content": answer.content})
        return "".join(block.text for block in answer.content if block.type == "text")

    def _compact(self, keep: str, excess: int) -> None:
        """Leave out the oldest turns, by as much as there is too much, and have what is left summarised."""
        old = self.messages[:-1]
        while excess > 0 and len(old) > 2:
            excess -= self._client.messages.count_tokens(model="any", messages=old[:1]).input_tokens
            old = old[2:]
        while True:
            asked = [*old, {"role": "user", "content": "Summarise the conversation so far."}]
            try:
                summary = self._ask(asked)
                break
            except anthropic.BadRequestError:
                old = old[2:]
        said = "".join(block.text for block in summary.content if block.type == "text")
        self.messages = [{"role": "user", "content": f"Before: {said}\n\n{keep}"}]

    def _ask(self, messages: list[Any]) -> anthropic.types.Message:
        with self._client.messages.stream(model="any", max_tokens=24, messages=messages) as stream:
            return stream.get_final_message()


def test_an_agents_session_that_overflows_is_compacted_and_goes_on(anthropic_client: anthropic.Anthropic) -> None:
    agent = Agent(anthropic_client)
    for number in range(12):
        agent.turn(f"Turn {number}. " + LONG[:1200])
    assert len(agent.compacted) >= 2  # over and over
    assert all(tokens > most == CONTEXT - 1 for tokens, most in agent.compacted)
    assert agent.messages[-1]["role"] == "assistant"
    assert 2 <= len(agent.messages) < 24


@pytest.mark.slow
@pytest.mark.parametrize(("package", "script"), [("litellm", LITELLM), ("langchain_openai", LANGCHAIN)])
def test_unmodified_clients_know_it(server_url: str, package: str, script: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[clients]'")
    command = [sys.executable, "-W", "ignore", "-c", script, server_url, LONG]
    environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # it would ask the network for prices
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["ok"]), done.stderr[-2000:]


def test_the_clients_own_error_has_the_code(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        openai_client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert refusal.value.code == "context_length_exceeded"
