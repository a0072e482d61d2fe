"""docs/parameters.md lists every parameter of the official clients, and the server does what it says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from fastapi.exceptions import RequestValidationError
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel, ValidationError

from kvist.server.anthropic.schema import MessagesRequest
from kvist.server.errors import problem_of
from kvist.server.openai.chat_schema import ChatBody
from kvist.server.openai.completions_schema import CompletionBody, EmbeddingBody
from kvist.server.openai.responses_schema import ResponsesBody

PAGE = Path(__file__).parents[2] / "docs" / "parameters.md"
SECTIONS = {
    "Chat completions": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    "Completions": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "Responses": ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    "Embeddings": ("/v1/embeddings", {"input": "a"}),
    "Messages": ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "model": "a"}),
}
TYPES: dict[str, list[Any]] = {
    "Chat completions": [chat_create_params.CompletionCreateParamsBase],
    "Completions": [completion_create_params.CompletionCreateParamsBase],
    "Responses": [response_create_params.ResponseCreateParamsBase],
    "Embeddings": [embedding_create_params.EmbeddingCreateParams],
    "Messages": [
        message_create_params.MessageCreateParamsBase,
        message_count_tokens_params.MessageCountTokensParams,
        beta_message_create_params.MessageCreateParamsBase,
    ],
}
BODIES: dict[str, type[BaseModel]] = {
    "Chat completions": ChatBody,
    "Completions": CompletionBody,
    "Responses": ResponsesBody,
    "Embeddings": EmbeddingBody,
    "Messages": MessagesRequest,
}
# Of each parameter that is taken, a value that its API allows; of the others that are refused, any value is.
TAKEN: dict[str, Any] = {
    "prediction": {"type": "content", "content": "b"},
    "verbosity": "low",
    "store": True,
    "metadata": {"user_id": "u"},
    "safety_identifier": "u",
    "user": "u",
    "service_tier": "auto",
    "truncation": "auto",
    "background_options": {"a": 1},
    "max_tool_calls": 3,
    "stream_options": {"include_obfuscation": False},
    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
    "betas": ["context-1m"],
    "billing_policy": "a",
    "diagnostics": {"a": 1},
    "fallback_credit_token": "a",
    "fallbacks": ["a"],
    "inference_geo": "eu",
    "speed": "fast",
    "user_profile_id": "u",
    "workspace_id": "w",
}


def rows(section: str) -> dict[str, str]:
    """What the page says of each parameter of a section: honoured, taken or refused."""
    text = PAGE.read_text("utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    found: dict[str, str] = {}
    for names, what in re.findall(r"^\| (`.*?`) \| (\w+) \|", text, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), what)
    return found


@pytest.fixture(scope="module")
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client


def answered(http: httpx.Client, section: str, **fields: Any) -> httpx.Response:
    path, body = SECTIONS[section]
    return http.post(path, json=body | fields)


@pytest.mark.parametrize("section", TYPES)
def test_every_parameter_of_the_clients_is_on_the_page(section: str) -> None:
    known = {name for kind in TYPES[section] for name in kind.__annotations__}
    said = rows(section)
    assert said.keys() >= known
    assert set(said.values()) <= {"honoured", "taken", "refused"}


@pytest.mark.parametrize("section", TYPES)
def test_what_is_refused_is_refused_by_name_and_what_is_taken_is_taken(http: httpx.Client, section: str) -> None:
    for name, what in rows(section).items():
        if what == "refused":
            refusal = answered(http, section, **{name: {"any": "value"}})
            assert (refusal.status_code, name in refusal.json()["error"]["message"]) == (400, True), refusal.text
            if section != "Messages":
                assert refusal.json()["error"]["param"] == name
            for empty in (None, False, [], {}, ""):
                assert answered(http, section, **{name: empty}).status_code == 200, (name, empty)
        elif what == "taken":
            response = answered(http, section, **{name: TAKEN[name]})
            assert response.status_code == 200, (name, response.text)


def test_what_is_honoured_is_read(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    for section, (path, _) in SECTIONS.items():
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = described["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"]
        honoured = {name for name, what in rows(section).items() if what == "honoured"}
        assert fields.keys() >= honoured, honoured - fields.keys()


def test_others_parameters_are_what_the_page_says(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()["components"]["schemas"]
    fields = described["ChatBody"]["properties"] | described["CompletionBody"]["properties"]
    for name, what in rows("Of others").items():
        if what == "honoured":
            assert name in fields
        else:
            refusal = answered(http, "Chat completions", **{name: 0.5})
            assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, name), refusal.text


@pytest.mark.parametrize("section", BODIES)
def test_no_name_of_ours_is_in_a_message(section: str) -> None:
    wrong: list[Any] = [3, "x", [3], {"type": "x"}, {"a": 1}, [{"type": "x"}], [[]], [{"type": "x", "role": "user"}]]
    told = []
    for name in rows(section):
        for value in wrong:
            body = SECTIONS[section][1] | {name: value}
            try:
                BODIES[section].model_validate(body)
            except ValidationError as error:
                complaints = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
                told.append(problem_of(RequestValidationError(complaints, body=body)).message)
    assert len(told) > len(rows(section))
    assert [text for text in told if re.search(r"\w\(\)|BaseModel|union|class |Block|Body|instance of", text)] == []
