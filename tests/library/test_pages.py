"""The documents' Python runs, from top to bottom of each page, and so do the examples."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from kvist.cache.codecs import CODECS
from kvist.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
EXAMPLES = ["generate", "score", "codecs", "recursive"]  # those that the bundled model can show


@pytest.mark.parametrize("page", ["README.md", "docs/library.md", "docs/plugins.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in (CODECS, FAMILIES):  # what a page registers is its own
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    document = Sybil([PythonCodeBlockParser()]).parse(ROOT / page)
    examples = list(document.examples())
    assert len(examples) == (ROOT / page).read_text().count("```python") > 0
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str) -> None:
    command = [sys.executable, ROOT / "examples" / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 3
    assert done.stderr == ""


def test_documents_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "rag.py"))
    for _ in range(2):
        example["main"](None, example["PLAYS"], str(tmp_path / "kv"))
    read, _, again = capsys.readouterr().out.split("asked verona:")  # by the first, what it said and read, the second
    assert read.splitlines() == ["read verona", "read denmark", "read rome"]
    assert "read verona" not in again
    assert "{'disk': " in again


def test_the_readme_is_one_page() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 120
