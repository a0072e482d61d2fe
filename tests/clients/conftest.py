"""A real server over a tiny random model, and clients of other people, as they are, in environments of their own."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import live
from tiny_model import open_serving, write_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
INSTALLED = Path(__file__).parents[2] / "build" / "clients"  # where `make test-clients` puts them
ROOM = 262_144  # tokens: agents begin with long instructions, and the model has a token for nearly each letter
SECONDS = 280  # for a client: agents look around before they ask

Script = Callable[[str, str], dict[str, Any]]
Program = Callable[..., str]


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = ServerSettings()
    serving = open_serving(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))
    with live(create_app(serving, settings), serving, settings) as server:
        yield server.url


@pytest.fixture(scope="session")
def roomy_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same with a long context, and answers that end soon: a random model would not end them itself."""
    settings = ServerSettings()
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", ROOM)
    (model / "generation_config.json").write_text(json.dumps({"stop_strings": list(" aeionrst")}))
    serving = open_serving(model, blocks=ROOM // 64)
    with live(create_app(serving, settings), serving, settings) as server:
        yield server.url


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
            return _told([node, copy, url], {})
        python = INSTALLED / environment / "bin" / "python"
        if not python.exists():
            pytest.skip(f"make test-clients installs {environment}")
        return _told([str(python), str(SCRIPTS / name), url], {})

    return run


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Runs a program of npm's in a new `work`, its home beside it as `home`, and gives what it prints."""

    def run(*command: str, files: dict[str, str] | None = None, **environment: str) -> str:
        found = INSTALLED / "npm" / "node_modules" / ".bin" / command[0]
        if not found.exists():
            pytest.skip(f"make test-clients installs {command[0]}, with npm")
        for folder in ("home", "work"):
            (tmp_path / folder).mkdir()
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        done = _run([str(found), *command[1:]], {"HOME": str(tmp_path / "home"), **environment}, tmp_path / "work")
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-3000:]
        return done.stdout

    return run


def _told(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = _run(command, environment, None)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _run(command: list[str], environment: dict[str, str], folder: Path | None) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command,
        env=own | environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
