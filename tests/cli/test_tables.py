"""Every table can be read at 80 columns: no line is longer, and no word or number is broken."""

import io
from pathlib import Path

import pytest
from command import Kvist
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvist.base import tables
from kvist.bench import report as bench_report
from kvist.bench.report import Ratio, Report, Row
from kvist.service.loaded import BUNDLED

FRAME = str.maketrans(dict.fromkeys("┏━┳┓┃┡╇┩│└─┴┘·", " "))


def rendered(table: Table, width: int) -> str:
    shown = io.StringIO()
    tables.show(Console(file=shown, width=width, legacy_windows=False), table)
    return shown.getvalue()


def check(table: Table, width: int = 80) -> None:
    narrow, wide = rendered(table, width), rendered(table, 5000)
    assert all(cell_len(line) <= width for line in narrow.splitlines()), narrow
    assert "…" not in narrow
    words = set(narrow.translate(FRAME).split())
    assert words <= set(wide.translate(FRAME).split()), narrow
    cells = (Text.from_markup(str(cell)).plain for column in table.columns for cell in column.cells)
    assert {word for cell in cells for word in cell.translate(FRAME).split()} <= words, narrow


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """The tables that verbs have shown, each of which was checked."""
    seen = list[Table]()
    show = tables.show

    def shown(console: Console, table: Table) -> None:
        monkeypatch.setattr(tables, "show", show)
        check(table)
        monkeypatch.setattr(tables, "show", shown)
        seen.append(table)

    monkeypatch.setattr(tables, "show", shown)
    monkeypatch.setattr(bench_report, "show", shown)
    return seen


@pytest.mark.parametrize(
    ("verb", "count"),
    [
        (["verify", "--steps", 1, "--trials", 1], 1),
        (["verify", "--steps", 1, "--trials", 1, "--kv", "turbo4", "--weights", "int8"], 1),
        (["trace", "-p", "abc"], 2),
        (["plan"], 1),
        (["plan", "--context", "4096,32768,131072,262144,1048576"], 1),
        (["fidelity", "--kv", "k=int8,v=turbo4", "--weights", "int8", "--tokens", 128, "--length", 128], 2),
        (["calibrate"], 2),
        (["eval", "codecs", "--codec", "turbo4,int8", "--dim", "64", "--samples", 256], 3),
        (["eval", "recall", "--kv", "turbo4", "--length", 128, "--questions", 16], 3),
        (["bench", "cache", BUNDLED, "--context", "32,64", "--plot", "cache.png"], 2),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, list) else "",
)
def test_verbs(
    kvist: Kvist,
    checked: list[Table],
    verb: list[object],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = kvist(*verb)
    assert outcome.code == 0, outcome.err
    assert len(checked) >= count


def test_a_report_of_long_names() -> None:
    row = Row(
        "a decode step behind a long prompt",
        "kvist",
        "llama-3.1-8b",
        "int8",
        "k=int8,v=turbo4",
        32768,
        1,
        1234.5,
        "tokens/s",
        (1.0, 2.0),
    )
    ratio = Ratio("a decode step behind a long prompt", "kvist k=int8,v=turbo4", "llama.cpp q8_0", 1.25)
    shown = io.StringIO()
    Report({"cpu": "a processor", "threads": 2.0}, [row], [ratio]).print(Console(file=shown, width=80))
    assert all(len(line) <= 80 for line in shown.getvalue().splitlines())
    for word in ("k=int8,v=turbo4", "llama.cpp", "tokens/s", "1.25"):
        assert word in shown.getvalue()


WORDS = st.text("abcdefgh0123456789.%", min_size=1, max_size=14)


@given(st.data(), st.integers(20, 100), st.integers(1, 12), st.integers(0, 4))
def test_any_table_of_words_that_fit(data: st.DataObject, width: int, columns: int, rows: int) -> None:
    table = Table(title=data.draw(WORDS))
    for _ in range(columns):
        justify = data.draw(st.sampled_from(["left", "right"]))
        table.add_column(data.draw(WORDS.filter(lambda word: len(word) < 8)), justify=justify)
    for _ in range(rows):
        table.add_row(*(data.draw(WORDS.filter(lambda word: len(word) < 10)) for _ in range(columns)))
    narrow = rendered(table, width)
    assert all(len(line) <= width for line in narrow.splitlines())
    for column in table.columns:
        for cell in column.cells:
            assert cell in narrow
