"""A tiny random model that chats, as a library has it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvist
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of the model."""
    directory: Path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return str(directory)


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[kvist.LLM]:
    with kvist.LLM(tiny, memory="8MiB", threads=1) as opened:
        yield opened
