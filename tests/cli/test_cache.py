"""`kvist cache`, and the page of what lies where."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvist
from kvist.base.errors import ConfigError, KvistError
from kvist.cache.disk import DiskTier
from kvist.cli.app import app
from kvist.ops.build import _locked
from kvist.service.cache_folder import WHAT, entries, unused

DOCS = Path(__file__).parents[2] / "docs"
PAGE, JSON_PAGE = DOCS / "files.md", DOCS / "json.md"
SOURCE = Path(kvist.__file__).parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with kernels, kept blocks, and what Kvist does not know."""
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    for name, size in (("ops/a/kernels.so", 100), ("kv/block.kv", 20), ("mine/letter", 3)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_ls_lists_what_is_known(folder: Path) -> None:
    result = CliRunner().invoke(app, ["cache", "ls", "--json"])
    assert [(entry["name"], entry["size"]) for entry in json.loads(result.stdout)] == [("ops", 100), ("kv", 20)]
    shown = CliRunner().invoke(app, ["cache", "ls"])
    assert "compiled kernels" in shown.stdout
    assert str(folder / "ops") in shown.stdout


def test_clear_leaves_contexts_and_what_is_not_known(folder: Path) -> None:
    assert CliRunner().invoke(app, ["cache", "clear"], input="n\n").exit_code == 1
    assert names(folder) == ["kv", "mine", "ops"]
    assert CliRunner().invoke(app, ["cache", "clear", "--yes"]).exit_code == 0
    assert names(folder) == ["kv", "mine"]
    assert CliRunner().invoke(app, ["cache", "clear", "mine", "--yes"]).exit_code != 0
    assert CliRunner().invoke(app, ["cache", "clear", "kv", "--yes"]).exit_code == 0
    assert names(folder) == ["mine"]


def test_a_link_is_neither_listed_nor_cleared(folder: Path) -> None:
    (folder / "packed").symlink_to(folder / "mine")
    assert CliRunner().invoke(app, ["cache", "clear", "--yes"]).exit_code == 0
    assert (folder / "mine" / "letter").exists()


def test_what_is_in_use_is_not_cleared(folder: Path) -> None:
    clear = ["cache", "clear", "kv", "ops", "--yes"]

    def refused(name: str) -> None:
        before = sorted(folder.rglob("*"))
        result = CliRunner().invoke(app, clear)
        assert isinstance(result.exception, KvistError)
        assert str(result.exception).startswith(f"{name} is in use: a running process has {folder / name}")
        assert sorted(folder.rglob("*")) == before, "nothing is deleted, not even what is not in use"

    servers = [DiskTier(folder / "kv", 1 << 20) for _ in range(2)]  # they share it with each other
    refused("kv")
    servers[0].close()
    refused("kv")
    servers[1].close()
    with _locked(folder / "ops" / "a"):  # kernels are compiled
        refused("ops")
    assert CliRunner().invoke(app, clear).exit_code == 0
    assert names(folder) == ["mine"]


def test_nobody_begins_to_use_what_is_being_cleared(folder: Path) -> None:
    with unused(entries()), pytest.raises(ConfigError, match="is being cleared; start again once that is done"):
        DiskTier(folder / "kv", 1 << 20)
    DiskTier(folder / "kv", 1 << 20).close()


def test_the_page_of_json_names_every_key(folder: Path) -> None:
    (section,) = re.findall(r"## `kvist cache ls --json`\n(.*?)(?:\n## |\Z)", JSON_PAGE.read_text(), re.DOTALL)
    for key in entries()[0].to_json():
        assert f"`{key}`" in section


def test_the_page_names_every_variable_and_folder() -> None:
    text = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    read = set(re.findall(r'os\.environ(?:\.get\(|\.setdefault\(|\[)\s*"(\w+)"', text))
    read |= set(re.findall(r'KEY_VARIABLE = "(\w+)"', text))
    assert {"KVIST_CACHE", "KVIST_OPS", "CXX"} < read
    folders = set(re.findall(r'cache_folder\(\) / "(\w+)"', text))
    assert folders == set(WHAT)
    page = PAGE.read_text()
    assert [name for name in sorted(read | folders) if f"`{name}`" not in page] == []
