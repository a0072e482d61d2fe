"""A real server over a tiny random model, and clients of other people, as they are, in environments of their own."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from answering_model import write_answering_model
from fixture_types import Program, Script, ServerOf
from recorded import Exchange, Recorded, Recorder

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from live import live
from tiny_model import open_serving, write_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
INSTALLED = Path(__file__).parents[2] / "build" / "clients"  # where `make test-clients` puts them
SECONDS = 280  # for a client: some look around before they ask
_KV_BYTES = 256 << 20


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = ServerSettings()
    serving = open_serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    with live(create_app(serving, settings), serving, settings) as server:
        yield server.url


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerOf]:
    """Starts a server over a model that answers, with a context of so many tokens, or gives the one that there is,
    its exchanges forgotten. Agents begin with long instructions, and the vocabulary has a token for nearly each letter.
    """
    with contextlib.ExitStack() as stack:

        @functools.cache
        def opened(context: int) -> Recorded:
            torch.set_num_threads(1)
            loaded = open_model(str(write_answering_model(tmp_path_factory.mktemp("models") / "tiny", context)))
            serving = Serving(loaded, loaded.engine(loaded.budget(_KV_BYTES, 4)), name="tiny")
            settings, exchanges = ServerSettings(), list[Exchange]()
            app = create_app(serving, settings)
            app.add_middleware(Recorder, exchanges=exchanges)
            return Recorded(stack.enter_context(live(app, serving, settings)).url, exchanges)

        def start(context: int) -> Recorded:
            server = opened(context)
            server.exchanges.clear()
            return server

        yield start


@pytest.fixture(scope="session")
def expected(url: str) -> str:
    """What the model answers to what all scripts ask."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 6}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    return str(answer["choices"][0]["message"]["content"])


@pytest.fixture
def script(url: str) -> Script:
    """Runs a script in one of the environments, and gives what it tells."""

    def run(environment: str, name: str) -> dict[str, Any]:
        if name.endswith(".mjs"):
            modules, node = INSTALLED / environment / "node_modules", shutil.which("node")
            if node is None or not modules.is_dir():
                pytest.skip(f"make test-clients installs {environment}, with npm")
            # Modules are looked for beside the script.
            copy = shutil.copy(SCRIPTS / name, modules.parent / name)
            return _told([node, copy, url])
        python = INSTALLED / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"make test-clients installs {environment}")
        return _told([str(python), str(SCRIPTS / name), url])

    return run


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Runs a program in `work`, with a home of its own beside it as `home`, and gives what it prints. Of this process's
    environment it gets where programs lie, and no more. `files`: written first, by their path beside both."""
    places = [INSTALLED / "npm" / "node_modules" / ".bin", INSTALLED / "aider" / "bin"]

    def run(*command: str, files: dict[str, str] | None = None, **environment: str) -> str:
        found = next((place / command[0] for place in places if (place / command[0]).exists()), None)
        if found is None:
            pytest.skip(f"make test-clients installs {command[0]}; npm's need npm")
        for folder in ("home", "work"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
        done = _run([str(found), *command[1:]], own | environment, tmp_path / "work")
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-3000:]
        return done.stdout

    return run


def _told(command: list[str]) -> dict[str, Any]:
    done = _run(command, {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, None)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _run(command: list[str], environment: dict[str, str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
