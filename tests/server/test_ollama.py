"""Ollama's routes over a tiny model: what they say is what the routes of OpenAI say, in other words."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from kvist.server.app import create_app
from kvist.server.errors import ApiError
from kvist.server.ollama.replies import Answer, as_message
from kvist.server.ollama.schema import OllamaChatBody
from kvist.server.ollama.translation import chat_of, check_thinks
from kvist.server.settings import ServerSettings
from kvist.text.response import FORMATS, Content, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd
from live import Live, live
from tiny_model import open_serving

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0, "num_predict": 6}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def ask(url: str, path: str, body: Any = None, method: str = "POST", **headers: str) -> httpx.Response:
    return httpx.request(method, f"{url}{path}", json=body, headers=headers, timeout=60)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.fixture(scope="module")
def expected(server_url: str) -> str:
    """What the model answers, by the route of OpenAI."""
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 6}
    return str(ask(server_url, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"])


def test_a_chat_is_lines_by_default_and_one_object_on_request(server_url: str, expected: str) -> None:
    body = {"model": "whatever:latest", "messages": HELLO, "options": GREEDY, "keep_alive": "5m"}
    *pieces, last = lines(ask(server_url, "/api/chat", body))
    assert "".join(piece["message"]["content"] for piece in pieces) == expected
    assert not any(piece["done"] for piece in pieces)
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 6)
    whole = ask(server_url, "/api/chat", {**body, "stream": False}).json()
    assert whole["message"] == {"role": "assistant", "content": expected}
    assert whole["prompt_eval_count"] == last["prompt_eval_count"] > 6
    assert whole["total_duration"] == pytest.approx(whole["prompt_eval_duration"] + whole["eval_duration"], abs=2)
    assert whole["kvist"]["cached"]["memory"] == whole["prompt_eval_count"] - 1


def test_generate_goes_through_the_template_or_not(server_url: str, expected: str) -> None:
    body = {"model": "tiny", "prompt": "Hello", "options": GREEDY, "stream": False}
    assert ask(server_url, "/api/generate", body).json()["response"] == expected
    raw = ask(server_url, "/api/generate", {**body, "raw": True}).json()["response"]
    completion = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
    assert raw == ask(server_url, "/v1/completions", completion).json()["choices"][0]["text"]
    assert raw != expected
    system = ask(server_url, "/api/generate", {**body, "system": "Short."}).json()
    chat = {"messages": [{"role": "system", "content": "Short."}, *HELLO], "max_tokens": 6, "temperature": 0}
    usage = ask(server_url, "/v1/chat/completions", chat).json()["usage"]
    assert system["prompt_eval_count"] == usage["prompt_tokens"]
    assert ask(server_url, "/api/generate", {**body, "raw": True, "system": "Short."}).status_code == 400


def test_a_format_holds_chats_and_raw_texts(server_url: str) -> None:
    long = {"temperature": 0, "num_predict": 300}
    chat = {"model": "tiny", "messages": HELLO, "stream": False, "format": CITY, "options": long}
    assert json.loads(ask(server_url, "/api/chat", chat).json()["message"]["content"]) == {"city": "Paris"}
    raw = {"model": "tiny", "prompt": "Hello", "raw": True, "stream": False, "format": CITY, "options": long}
    assert json.loads(ask(server_url, "/api/generate", raw).json()["response"]) == {"city": "Paris"}


def test_options_are_those_of_other_routes(server_url: str) -> None:
    def drawn(**options: Any) -> str:
        body = {"messages": HELLO, "stream": False, "options": {"num_predict": 12, **options}}
        found = ask(server_url, "/api/chat", {"model": "tiny", **body})
        assert found.status_code == 200, found.text
        return str(found.json()["message"]["content"])

    same = {"messages": HELLO, "max_tokens": 12, "seed": 5, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.5}
    expected = ask(server_url, "/v1/chat/completions", same).json()["choices"][0]["message"]["content"]
    options = {"seed": 5, "temperature": 0.7, "top_k": 9, "repeat_penalty": 1.5}
    assert drawn(**options) == drawn(**options, repeat_last_n=-1, mirostat=0, typical_p=1, num_ctx=8192) == expected
    assert drawn(**options, repeat_last_n=0) == drawn(seed=5, temperature=0.7, top_k=9) != expected
    assert drawn(seed=-1) != drawn(seed=-1)  # another one each time


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "repeat_last_n"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"messages": [{"role": "user", "content": "", "images": ["aGk="]}]}, "text alone"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
        ({"messages": [{"role": "user", "content": "Hm. " * 5000}]}, "> 2047 maximum"),
    ],
)
def test_refusals_are_one_line_in_ollamas_shape(server_url: str, body: dict[str, Any], said: str) -> None:
    response = ask(server_url, "/api/chat", {"model": "tiny", "messages": HELLO, **body})
    assert response.status_code == 400
    (message,) = response.json().values()
    assert response.json().keys() == {"error"}
    assert any(one in message for one in said.split("|")), message
    assert "\n" not in message


def test_a_model_that_does_not_think_cannot_be_asked_to() -> None:
    plain: Any = SimpleNamespace(format=FORMATS["plain"])
    check_thinks(plain, "twig", None)
    check_thinks(plain, "twig", False)
    for think in (True, "high"):
        with pytest.raises(ApiError, match="'twig' does not support thinking"):
            check_thinks(plain, "twig", think)  # type: ignore[arg-type]
    body = {"model": "twig", "messages": HELLO}
    assert chat_of(OllamaChatBody.model_validate({**body, "think": "high"})).reasoning_effort == "high"
    assert chat_of(OllamaChatBody.model_validate({**body, "think": False})).chat_template_kwargs == {
        "enable_thinking": False
    }


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_is_json_whatever_it_is_called(server_url: str, expected: str, kind: str | None) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO, "options": GREEDY, "stream": False})
    headers = {} if kind is None else {"content-type": kind}
    found = httpx.post(f"{server_url}/api/chat", content=body, headers=headers, timeout=60)
    assert found.json()["message"]["content"] == expected
    broken = httpx.post(f"{server_url}/api/chat", content="{", headers=headers, timeout=60)
    assert broken.status_code == 400
    assert "cannot be read as JSON" in broken.json()["error"]


@pytest.mark.parametrize("field", ["suffix", "template", "context", "images"])
def test_what_would_change_a_prompt_is_refused_by_name(server_url: str, field: str) -> None:
    value = [1, 2] if field in ("context", "images") else "x"
    response = ask(server_url, "/api/generate", {"model": "tiny", "prompt": "a", field: value})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"{field} is not supported")


@pytest.mark.parametrize("verb", ["pull", "push", "create", "copy", "delete", "blobs/sha256:0"])
def test_models_are_neither_fetched_nor_made_nor_removed(server_url: str, verb: str) -> None:
    for method in ("POST", "DELETE"):
        response = ask(server_url, f"/api/{verb}", {"model": "x"}, method)
        assert response.status_code == 400
        assert f"{verb.partition('/')[0]} is not supported" in response.json()["error"]


def test_facts(server_url: str) -> None:
    (listed,) = ask(server_url, "/api/tags", method="GET").json()["models"]
    (loaded,) = ask(server_url, "/api/ps", method="GET").json()["models"]
    assert listed["name"] == "tiny"
    assert len(listed["digest"]) == 64
    assert {**listed, **loaded} == loaded
    assert loaded["context_length"] == 2048
    shown = ask(server_url, "/api/show", {"model": "tiny"}).json()
    # 402 x 32 of the embedding; of each layer 32 x 32 twice, 32 x 16 twice, 32 x 48 three times, two norms; one norm.
    parameters = 402 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert shown["model_info"]["general.parameter_count"] == parameters
    assert listed["size"] == 4 * parameters
    assert shown["model_info"]["llama.context_length"] == 2048
    assert shown["capabilities"] == ["completion", "embedding", "tools", "thinking"]
    assert ask(server_url, "/api/version", method="GET").json()["version"].count(".") == 2
    assert ask(server_url, "/api/tags", method="HEAD").status_code == 200
    assert ask(server_url, "/api/chat", {"model": "tiny", "messages": []}).json()["done_reason"] == "load"
    assert ask(server_url, "/api/generate", {"model": "tiny", "keep_alive": 0}).json()["done"] is True


def test_embeddings(server_url: str) -> None:
    body = {"input": ["a king", "a tree"]}
    openai = [one["embedding"] for one in ask(server_url, "/v1/embeddings", body).json()["data"]]
    assert ask(server_url, "/api/embed", {"model": "tiny", **body}).json()["embeddings"] == openai
    old = ask(server_url, "/api/embeddings", {"model": "tiny", "prompt": "a king"}).json()
    assert old == {"embedding": openai[0]}
    assert ask(server_url, "/api/embed", {"model": "tiny", "input": []}).json()["embeddings"] == []
    long = {"model": "tiny", "input": "Hm. " * 3000}
    assert ask(server_url, "/api/embed", long).json()["prompt_eval_count"] == 2048
    assert ask(server_url, "/api/embed", {**long, "truncate": False}).status_code == 400
    assert ask(server_url, "/api/embed", {"model": "tiny", "input": "a", "dimensions": 2}).status_code == 400


def test_calls_and_reasoning_in_ollamas_shape() -> None:
    answer = Answer(None, "tiny", as_message, None, None)  # type: ignore[arg-type]
    parts = (
        Reasoning("Hm."),
        Content("Well: "),
        ToolCallBegin(0, "weather"),
        ToolCallArguments(0, '{"city": '),
    )
    assert as_message(answer._said(parts)) == {"message": {"role": "assistant", "content": "Well: ", "thinking": "Hm."}}
    ended = answer._said((ToolCallArguments(0, '"Paris"}'), ToolCallEnd(0), ToolCallBegin(1, "broken")))
    function = {"index": 0, "name": "weather", "arguments": {"city": "Paris"}}
    assert as_message(ended)["message"]["tool_calls"] == [{"function": function}]


def test_a_history_of_calls_is_told_apart_by_their_order() -> None:
    call = [{"function": {"name": name, "arguments": {"n": index}}} for index, name in enumerate("aba")]
    answers = [{"role": "tool", "content": str(index), "tool_name": name} for index, name in enumerate("baa")]
    said = {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": call}
    messages = [*HELLO, said, *answers]
    found = chat_of(OllamaChatBody.model_validate({"model": "tiny", "messages": messages})).messages
    assert [one.id for one in found[1].tool_calls] == ["call_0", "call_1", "call_2"]  # type: ignore[union-attr]
    assert [one.tool_call_id for one in found[2:]] == ["call_1", "call_0", "call_2"]  # type: ignore[union-attr]
    assert found[1].tool_calls[1].function.arguments == '{"n": 1}'  # type: ignore[union-attr]
    assert found[1].reasoning_content == "Hm."  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[Live]:
    settings = ServerSettings(api_keys=("key-a", "key-b"), max_waiting=1)
    serving = open_serving(tiny_model, running=1, strict_model=True)
    with live(create_app(serving, settings), serving, settings) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": HELLO}),
        ("/api/generate", {"prompt": "a"}),
        ("/api/embed", {"input": "a"}),
        ("/api/show", {}),
        ("/completion", {"prompt": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["a"]}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 1}),
        ("/openai/deployments/other/chat/completions", {"messages": HELLO}),
    ],
)
def test_every_door_wants_the_key_and_the_name_where_it_is_strict(guarded: Live, path: str, body: Any) -> None:
    asked = {"model": "other", **body}
    assert ask(guarded.url, path, asked).status_code == 401
    found = ask(guarded.url, path, asked, **{"api-key": "key-a"})
    assert found.status_code == 404
    assert "there is no model 'other' here; this server has 'tiny'" in found.text
    foreign = {"authorization": "Bearer key-b", "origin": "http://elsewhere.example"}
    assert ask(guarded.url, path, asked, **foreign).status_code == 403


def test_what_all_do_together_is_shown_to_operators(guarded: Live) -> None:
    assert ask(guarded.url, "/slots", method="GET", **{"api-key": "key-a"}).status_code == 403
