"""A real server over a tiny random model, on a loopback port."""

from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import open_serving, write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the model."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def live_server(tiny_model: Path) -> Iterator[Live]:
    """A server that stays for all tests; what it is asked may be found in its cache by a later one."""
    settings, serving = ServerSettings(), open_serving(tiny_model)
    with live(create_app(serving, settings), serving, settings) as server:
        yield server


@pytest.fixture(scope="session")
def server_url(live_server: Live) -> str:
    return live_server.url


@pytest.fixture(scope="session")
def openai_client(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def anthropic_client(server_url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server_url, api_key="none", max_retries=0) as client:
        yield client
