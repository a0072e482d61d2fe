"""examples/plugin, installed as anybody installs it, and used from the command line; and packages that are broken."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packages import INT3, Install

from kvist.base.errors import ConfigError
from kvist.cache.tiers import open_tier
from kvist.cli import main

ROOT = Path(__file__).parents[2]
SHORT = ("--tokens", "150", "--threads", "1", "--json")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has put it into, with no network."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "examples" / "plugin", source)
    target = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def answered(installed: Path, *arguments: str) -> Any:
    """What a command of a process of its own prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvist", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=installed)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_used_from_the_command_line(installed: Path) -> None:
    text = "ROMEO: " + "O gentle night, be kind to those who wait. " * 4
    ran = answered(installed, "run", "--prompt", text, "--max-tokens", "5", "--kv", "int3", "--threads", "1", "--json")
    assert ran["kv"]["codec"] == "int3"
    verified = answered(installed, "verify", "--kv", "turbo4,0:int3", "--steps", "2", "--trials", "1", *SHORT)
    assert verified["passed"]
    (row,) = answered(installed, "fidelity", "--kv", "int3", "--length", "150", *SHORT)["rows"]
    assert row["kv"] == "int3"
    assert row["bits_per_value"] < 3.6
    assert 0 < row["kld_mean"] < 1


def test_its_own_tests_pass_and_its_tier_is_shared(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    tests = runpy.run_path(str(ROOT / "examples" / "plugin" / "tests" / "test_plugin.py"))
    tests["test_int3"]()
    tests["test_sqlite"](tmp_path)
    assert sys.modules["kvist_example"].__file__ == str(installed / "kvist_example" / "__init__.py")
    url, name = f"sqlite://{tmp_path}/shared.db?mib=1", f"{'a' * 32}/{'b' * 64}"
    one, two = open_tier(url), open_tier(url)
    assert one.put(name, (b"rec", b"ord"), 0.0)
    assert two.get(name, 6) == b"record"
    for tier in (one, two):
        tier.close()
    for wrong in ("sqlite://", "sqlite:///x?mib=-1", "sqlite://host/x", f"sqlite://{tmp_path}/none/x"):
        with pytest.raises(ConfigError, match=r"sqlite:///a/path\?mib=512|cannot be opened: unable to open"):
            open_tier(wrong)


@pytest.mark.parametrize(
    ("codecs", "says"),
    [
        ({"int3": "plugged_none:INT3"}, "'int3' of bad 1 cannot be imported: ModuleNotFoundError: No module named"),
        ({"int3": "plugged_bad:INT4"}, "'int3' of bad 1 cannot be imported: AttributeError"),
        ({"int3": "plugged_bad:LEVELS"}, "'int3' of bad 1 is refused: its in_place is neither True nor False"),
        ({"turbo4": "plugged_bad:INT3", "int3": "plugged_bad:INT3"}, None),
    ],
)
def test_one_that_is_broken_is_one_line(
    codecs: dict[str, str],
    says: str | None,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("bad", "1", codecs=codecs, modules={"plugged_bad": INT3 + "\n    LEVELS = ()\n"})

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kvist", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    code, told = command("run", "--prompt", "a", "--max-tokens", "1", "--kv", "int3", "--json")
    if says is None:  # it can be used, and whoever lists all names is told what else it offers
        assert code == 0
        code, told = command("eval", "codecs", "--dim", "64", "--samples", "64")
        says = "'turbo4' of bad 1 has a name that is taken, by Kvist; it needs another one"
    assert code == 1
    assert told.startswith(f"kvist: the KV codec {says}")
    assert told.count("\n") == 1
