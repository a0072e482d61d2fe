"""The commands that the documents name are there: verbs, and options of these verbs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from kvist.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ENGINES = [["cached"], ["recomputed"]]  # of whose measurements docs/json.md tells under "kvist cached"
COMMAND: Any = typer.main.get_command(app)


def commands(text: str) -> list[list[str]]:
    """The words of each `kvist ...` in code, of a line or of a block."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = []
    for line in [*lines, *spans]:
        if line.startswith("kvist "):
            line = re.split(r" [|;#&] ?|\s#|; ", line)[0]
            found.append(shlex.split(line.replace("'", ""), comments=True)[1:])
    return [words for words in found if words not in ENGINES]


def wrong(words: list[str]) -> str | None:
    """What of a command there is not."""
    command = COMMAND
    rest = list(words)
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        word = rest.pop(0).rstrip(",.")
        if not re.fullmatch("[a-z]+", word):
            return None  # a placeholder, as in `kvist bench NAME --json`
        if word not in command.commands:
            return f"there is no verb {word}"
        command = command.commands[word]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [name for word in rest if (name := word.partition("=")[0]).startswith("--") and name not in known]
    return f"{command.name} has no {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    problems = {" ".join(words): problem for words in commands(page.read_text()) if (problem := wrong(words))}
    assert problems == {}


def test_commands_are_found_and_wrong_ones_are_told() -> None:
    text = "`kvist run -p x --stream`\n\n```\n$ kvist fly --now\n```\n and `kvist bench decode --peer\nllama.cpp`"
    assert [wrong(words) for words in commands(text)] == ["there is no verb fly", "run has no --stream", None]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60
