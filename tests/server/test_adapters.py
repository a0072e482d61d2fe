"""Adapters behind the APIs: each a model of its own name, mixed in one server."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anthropic
import openai
import pytest
import torch
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.models.lora import CONFIG, FILE
from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from kvist.weights.checkpoint import save
from live import Live, live


def write_adapter(folder: Path, seed: int, rows: int = 32) -> Path:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(2):
        for side, shape in (("A", (4, 32)), ("B", (rows, 4))):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            tensors[name] = torch.randn(shape, generator=generator)
    folder.mkdir(parents=True)
    save(folder / FILE, tensors)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: write_adapter(folder / name, seed) for seed, name in enumerate(("poems", "code"))}
    loaded = open_model(str(tiny_model), adapters=adapters)
    budget = loaded.budget(loaded.layout.store_bytes(256, 0, 0), 4)
    settings, serving = ServerSettings(), Serving(loaded, loaded.engine(budget), name="tiny")
    with live(create_app(serving, settings), serving, settings) as running:
        yield running


def test_each_is_a_model_of_its_own(server: Live) -> None:
    prompt = "the quick brown fox jumps over the lazy dog, again and again"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny", "poems", "code"]
        assert client.models.retrieve("poems").id == "poems"

        def ask(model: str) -> tuple[str, str]:
            answer = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
            return answer.model, answer.choices[0].text

        alone = {name: ask(name) for name in ("tiny", "poems", "code")}
        assert [named for named, _ in alone.values()] == ["tiny", "poems", "code"]
        assert len({text for _, text in alone.values()}) == 3
        with ThreadPoolExecutor(6) as pool:  # in one batch, over what is cached of each by now
            names = ["poems", "tiny", "code", "poems", "tiny", "code"]
            assert list(pool.map(ask, names)) == [alone[name] for name in names]
        with pytest.raises(openai.NotFoundError, match="this server has 'tiny', 'poems', 'code'"):
            ask("martian")
        vectors = [client.embeddings.create(model=name, input=prompt).data[0].embedding for name in ("tiny", "poems")]
        assert vectors[0] != vectors[1]
        chats = [
            client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hi"}], max_tokens=12, temperature=0
            )
            for name in ("tiny", "code")
        ]
        assert [chat.model for chat in chats] == ["tiny", "code"]
        assert chats[0].choices[0].message.content != chats[1].choices[0].message.content


def test_messages(server: Live) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        answers = [
            client.messages.create(model=name, max_tokens=12, messages=[{"role": "user", "content": "hi"}])
            for name in ("whatever", "code")
        ]
    assert [answer.model for answer in answers] == ["tiny", "code"]


def test_an_explanation_does_not_cross_adapters(server: Live) -> None:
    prompt = "a prompt of its own, long enough to fill more than a block of sixty-four tokens, so that it is cached"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = []
        for name in ("tiny", "poems", "poems"):
            answer = client.completions.create(model=name, prompt=prompt, max_tokens=4, temperature=0)
            found.append(answer.model_dump()["kvist"])
    assert [one["reason"] for one in found] == ["new", "new", "continued"]
    assert [one["cached"] for one in found[:2]] == [{}, {}]
    assert found[2]["cached"]["memory"] > 50


def test_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", 1)

    def run(*more: str) -> str:
        result = CliRunner().invoke(
            app, ["run", str(tiny_model), "-p", "hello", "--max-tokens", "16", "--temperature", "0", "--json", *more]
        )
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["text"]

    assert run() != run("--adapter", str(adapter))
    for wrong in ("poems", "=x", "poems=", "a=b"):
        given = ["serve", str(tiny_model), "--port", "0", "--adapter", "a=b", "--adapter", wrong]
        result = CliRunner().invoke(app, given)
        assert "--adapter takes a new name and a folder" in str(result.exception)
    other = write_adapter(tmp_path / "b", 1, rows=48)
    result = CliRunner().invoke(app, ["verify", str(tiny_model), "--adapter", str(other)])
    assert "is an adapter of another model" in str(result.exception)
