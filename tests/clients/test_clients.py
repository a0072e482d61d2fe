"""Clients of other people, unmodified, against a real server: each gets, over each API that it speaks, the same text as
a plain request. docs/clients.md says which there are. `make test-clients` installs them; they are skipped without."""

import json

import pytest
from fixture_types import Script

pytestmark = pytest.mark.slow

PARIS = {"city": "Paris"}
HIDDEN = 32  # of the model: its embeddings' width


def same(found: dict[str, object], expected: str, *names: str) -> None:
    """Each of these is the model's answer."""
    assert {name: str(found[name]).strip() for name in names} == dict.fromkeys(names, expected.strip())


def test_openai(script: Script, expected: str) -> None:
    found = script("sdks", "openai_sdk.py")
    same(found, expected, "text", "streamed", "responses", "azure")
    assert json.loads(found["arguments"]) == PARIS
    assert (found["models"], found["dimensions"]) == (["tiny"], HIDDEN)


def test_anthropic(script: Script, expected: str) -> None:
    found = script("sdks", "anthropic_sdk.py")
    same(found, expected, "text", "streamed")
    assert found["arguments"] == PARIS
    assert (found["models"], found["model"]) == (["tiny"], "tiny")
    assert found["counted"] > 6


def test_ollama(script: Script, expected: str) -> None:
    found = script("sdks", "ollama_sdk.py")
    same(found, expected, "text", "streamed", "generated")
    assert json.loads(found["structured"]) == PARIS
    assert found["models"] == found["running"] == ["tiny"]
    assert "tools" in found["capabilities"]
    assert found["dimensions"] == HIDDEN


def test_litellm(script: Script, expected: str) -> None:
    found = script("sdks", "litellm_sdk.py")
    same(found, expected, "text", "anthropic", "ollama")
    assert sorted(found["ranked"]) == [0, 1]


def test_instructor(script: Script) -> None:
    assert script("sdks", "instructor_sdk.py") == {"tools": "Paris", "json_schema": "Paris"}


def test_llm(script: Script, expected: str) -> None:
    same(script("sdks", "llm_sdk.py"), expected, "text")


def test_openai_agents(script: Script, expected: str) -> None:
    same(script("sdks", "openai_agents_sdk.py"), expected, "text", "responses")


def test_pydantic_ai(script: Script, expected: str) -> None:
    found = script("sdks", "pydantic_ai_sdk.py")
    same(found, expected, "text")
    assert found["city"] == "Paris"


def test_langchain(script: Script, expected: str) -> None:
    found = script("chains", "langchain_sdk.py")
    same(found, expected, "text", "streamed", "anthropic", "ollama")
    assert found["city"] == found["called"] == found["structured_ollama"] == "Paris"
    assert found["dimensions"] == HIDDEN


def test_llama_index(script: Script, expected: str) -> None:
    found = script("chains", "llama_index_sdk.py")
    same(found, expected, "text", "ollama")
    assert found["dimensions"] == HIDDEN


@pytest.mark.parametrize("name", ["smolagents", "haystack", "dspy"])
def test_agents(script: Script, expected: str, name: str) -> None:
    same(script("agents", f"{name}_sdk.py"), expected, "text")


def test_openai_js(script: Script, expected: str) -> None:
    same(script("npm", "openai_js.mjs"), expected, "text", "streamed", "responses")


def test_anthropic_js(script: Script, expected: str) -> None:
    found = script("npm", "anthropic_js.mjs")
    same(found, expected, "text", "streamed")
    assert found["models"] == ["tiny"]


def test_ollama_js(script: Script, expected: str) -> None:
    found = script("npm", "ollama_js.mjs")
    same(found, expected, "text", "streamed")
    assert found["models"] == ["tiny"]


def test_ai_sdk(script: Script, expected: str) -> None:
    same(script("npm", "ai_sdk.mjs"), expected, "text", "streamed", "responses", "anthropic")
