"""Tables of what lies on disk, and of what a server says, as they look at 80 columns."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Kvist
from rich.console import Console

from kvist.base import tables
from kvist.cli import explain
from kvist.service.contexts import Contexts, describe
from kvist.service.identity import Identity

NOW = 1_800_000_000.0

CONTEXTS = """\
{0}
  model Meta-Llama-3.1-70B-Instruct-Q4_K_M · form chat · tokens 131,072
  on disk 5.8 MiB · codec k=int8,v=turbo4,0-1:bf16 · used 2h00m ago
broken
  model damaged
short
  model smollm2 · form text · tokens 128 · on disk 5.0 MiB · codec turbo4
  used 3.0s ago
"""

FOUND = {
    "prompt_tokens": 1234,
    "cached": {"memory": 200, "disk": 1000},
    "computed": 34,
    "reason": "changed",
    "why": "the text is another from here on",
    "again": 30,
    "again_seconds": 1.5,
    "nearest": "chatcmpl-0123456789abcdef01234567",
    "common": 1203,
    "difference": {
        "token": 1203,
        "character": 4000,
        "now": {
            "where": "tool 'x[/]\x1b[31m'", "line": 3, "column": 1200,
            "before": "y" * 29 + "\n", "after": "z" * 60, "token": " [bold]now",
        },
        "earlier": {
            "where": "the system message", "line": None, "column": None,
            "before": "y" * 29 + "\n", "after": "", "token": None,
        },
    },
    "note": "[/] it was put off for others",
}  # fmt: skip

EXPLAINED = """\
1,234 prompt tokens: 200 from memory + 1,000 from disk, 34 computed
changed: the text is another from here on
paid again: 30 tokens that an earlier request had, about 1.5s
nearest earlier request: chatcmpl-0123456789abcdef01234567, alike in its first
1,203 tokens
the first difference, at token 1,203:
earlier
  where the system message · text yyyyyyyyyyyyyyyyyyyyyyyyyyyyy\\n(its end)
now
  where tool 'x[/]?[31m', line 3, column 1200
  text yyyyyyyyyyyyyyyyyyyyyyyyyyyyy\\nzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz
  token ' [bold]now'
[/] it was put off for others
"""

PAID = {
    "session": "[/x]",
    "requests": 12,
    "prompt_tokens": 120_000,
    "cached": 90_000,
    "computed": 30_000,
    "again": 20_000,
    "again_seconds": 75.2,
    "necessary": 10_000,
    "stable": 4_000,
    "changing": 6_000,
    "breaks": [
        {"what": "changed: tool 'read_many_files_of_a_repository[/]', line 1234", "times": 11, "again": 19_000,
         "seconds": 70.0},
        {"what": "evicted", "times": 1, "again": 1_000, "seconds": 5.2},
    ],
    "parts": [{"label": "message 2 (user)", "tokens": 12}, {"label": "the system message", "tokens": 4_000}],
}  # fmt: skip

TAXED = """\
session [/x]: 12 requests, 120,000 prompt tokens
90,000 read from the cache (75.0%), 30,000 computed where 10,000 were necessary,
20,000 of them paid again (1m15s)
stable prefix: 4,000 tokens; behind it, in the median prompt, 6,000 tokens that
change
what breaks the cache                                 times  tokens again   time
changed: tool 'read_many_files_of_a_repository[/]',      11        19,000  1m10s
line 1234
evicted                                                   1         1,000   5.2s
part of the last prompt  tokens
the system message        4,000
message 2 (user)             12
"""

LISTED = """\
┏━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ name ┃    size ┃ last written ┃ what                     ┃
┡━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ ops  │ 2.0 KiB │ {day}   │ compiled kernels         │
│ kv   │ 5.0 MiB │ {day}   │ kept blocks and contexts │
└──────┴─────────┴──────────────┴──────────────────────────┘
"""


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "output", lambda: Console(width=80, legacy_windows=False))
    monkeypatch.setattr(time, "time", lambda: NOW)


def without_ends(text: str) -> str:
    """Lines without the spaces that nobody sees."""
    assert all(len(line) <= 80 for line in text.splitlines())
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_contexts(kvist: Kvist, tmp_path: Path) -> None:
    contexts, long = Contexts(tmp_path), "a" * 64
    for name, model, kv, form, tokens, age in (
        (long, "Meta-Llama-3.1-70B-Instruct-Q4_K_M", "k=int8,v=turbo4,0-1:bf16", "chat", 131_072, 7200),
        ("short", "smollm2", "turbo4", "text", 128, 3),
    ):
        identity = Identity(model, *["0" * 64] * 3, kv, *["0" * 64] * 3)
        contexts.save(describe(name, "", form, "x", [1] * tokens, (), identity, 64, (5 << 19) // (tokens // 128 or 1)))
        os.utime(contexts._path(name), (NOW - age,) * 2)
    contexts._path("broken").write_text("{")
    assert without_ends(kvist("context", "list", "--cache-dir", tmp_path).out) == CONTEXTS.format(long)


@pytest.mark.parametrize(
    ("arguments", "answer", "expected"),
    [(("explain", "chatcmpl-1"), FOUND, EXPLAINED), (("tax",), PAID, TAXED)],
    ids=["explain", "tax"],
)
def test_what_a_server_says(
    kvist: Kvist,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    answer: dict[str, Any],
    expected: str,
) -> None:
    ask: Callable[..., dict[str, Any]] = lambda url, path, query: answer  # noqa: E731
    monkeypatch.setattr(explain, "_ask", ask)
    outcome = kvist(*arguments)
    assert outcome.code == 0, outcome.err
    assert without_ends(outcome.out) == expected


def test_folders(kvist: Kvist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    for name, size in (("ops", 2048), ("kv", 5 << 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
        os.utime(tmp_path / name / "file", (NOW, NOW))
    day = time.strftime("%Y-%m-%d", time.localtime(NOW))
    assert kvist("cache", "ls").out == LISTED.format(day=day) + f"{tmp_path / 'ops'}\n{tmp_path / 'kv'}\n"
