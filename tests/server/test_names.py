"""Names of models, the two lists of them, Azure's paths, and the pages."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from kvist.server.errors import ApiError
from kvist.server.openai.models import Served, served
from kvist.service.loaded import plain_name

HELLO = [{"role": "user", "content": "Hello"}]


def serving(strict: bool, **adapters: str) -> Any:
    return SimpleNamespace(name="twig", adapters=adapters, strict_model=strict)


def test_any_name_stands_for_one_model_unless_the_server_is_strict() -> None:
    for name in (None, "twig", "gpt-5", "../x", ""):
        assert served(serving(False), name) == Served("twig")
    assert served(serving(True), None) == served(serving(True), "twig") == Served("twig")
    with pytest.raises(ApiError, match="there is no model 'gpt-5' here; this server has 'twig'") as caught:
        served(serving(True), "gpt-5")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_adapters_are_chosen_by_their_own_names() -> None:
    for strict in (False, True):
        host = serving(strict, poems="id-of-poems")
        assert served(host, "poems") == Served("poems", "id-of-poems")
        assert served(host, "twig") == served(host, None) == Served("twig")
        with pytest.raises(ApiError, match="this server has 'twig', 'poems'"):
            served(host, "poem")


def test_plain_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "twig.Q8_0.gguf").touch()
    (tmp_path / "v1.5").mkdir()
    monkeypatch.chdir(folder)
    names = {
        str(folder): "my-model",
        f"{folder}/": "my-model",
        "../my-model": "my-model",
        ".": "my-model",
        "..": tmp_path.name,
        "../v1.5": "v1.5",
        "twig.Q8_0.gguf": "twig.Q8_0",
        str(folder / "twig.Q8_0.gguf"): "twig.Q8_0",
        "org/model-1.5": "org/model-1.5",  # on a hub
        "org/model/file.gguf": "org/model/file",
    }
    assert {name: plain_name(name) for name in names} == names


def test_anthropics_list_of_models(anthropic_client: anthropic.Anthropic, server_url: str) -> None:
    (model,) = anthropic_client.models.list()
    assert (model.id, model.type, model.display_name) == ("tiny", "model", "tiny")
    assert anthropic_client.models.retrieve("tiny") == model
    with pytest.raises(anthropic.NotFoundError, match="there is no model 'claude'"):
        anthropic_client.models.retrieve("claude")
    headers = {"anthropic-version": "2023-06-01"}
    for query in ("after_id=tiny", "before_id=tiny", "after_id=none"):
        page = httpx.get(f"{server_url}/v1/models?{query}", headers=headers).json()
        assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


def test_azures_paths_and_header(openai_client: openai.OpenAI, server_url: str) -> None:
    with openai.AzureOpenAI(azure_endpoint=server_url, api_key="none", api_version="2024-10-21") as azure:
        asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}
        expected = openai_client.chat.completions.create(**asked).choices[0].message.content
        assert azure.chat.completions.create(**asked).choices[0].message.content == expected
        plain: Any = {"model": "tiny", "prompt": "a", "max_tokens": 4, "temperature": 0}
        text = openai_client.completions.create(**plain).choices[0].text
        assert azure.completions.create(**plain).choices[0].text == text
        vector = openai_client.embeddings.create(model="tiny", input="a").data[0].embedding
        assert azure.embeddings.create(model="tiny", input="a").data[0].embedding == vector


def test_pages_load_and_run_nothing(server_url: str) -> None:
    root = httpx.get(server_url)
    assert re.fullmatch(r"Kvist \S+ serves tiny: /docs lists the routes\.\n", root.text)
    assert httpx.head(server_url).status_code == 200
    page = httpx.get(f"{server_url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"<script|src=|https?://|@import|url\(", page.text)
    described = httpx.get(f"{server_url}/openapi.json").json()["paths"]
    for path in described:
        assert f"&nbsp;{path}</code>" in page.text
    assert "<code>messages</code>" in page.text
