"""Studies of a model as values: what the command line says, as tables that print and show."""

from pathlib import Path

import pytest

import kvist
from kvist.evals.tradeoff import plot


def test_a_plan_is_a_table() -> None:
    found = kvist.plan(kv=["bf16", "turbo4"], contexts=[1024])
    assert [row.kv for row in found.rows] == ["bf16", "turbo4"]
    shown = str(found)
    assert "naive bf16" in shown
    assert "1,024 tokens" in shown
    assert found._repr_html_().count("<tr>") == 4
    with pytest.raises(kvist.RequestError, match="kv is a list of codecs here"):
        kvist.plan(kv="turbo4")


def test_a_proof_is_a_table() -> None:
    told = list[str]()
    report = kvist.verify(kv="turbo4", tokens=130, steps=2, trials=1, watch=told.append)
    assert report.exact
    assert report.passed
    assert told == [check.name for check in report.checks]
    assert str(report).count("equal") == sum(check.kind.value == "exact" for check in report.checks)
    assert "DIFFERS" not in report._repr_html_()


def test_what_compression_costs_is_a_table_and_a_picture(tmp_path: Path) -> None:
    text = "ROMEO:\nIf I profane with my unworthiest hand\nThis holy shrine, the gentle fine is this.\n" * 6
    file = tmp_path / "play.txt"
    file.write_text(text)
    report = kvist.fidelity(kv=["turbo4", "turbo2"], text=text, tokens=300, length=300)
    assert [row.kv for row in report.rows] == ["turbo4", "turbo2"]
    assert 0 < report.rows[0].divergence.kld_mean < report.rows[1].divergence.kld_mean
    assert kvist.fidelity(kv=["turbo4", "turbo2"], text=file, tokens=300, length=300).rows == report.rows
    assert "turbo2" in str(report)
    drawn = report.figure()
    assert drawn is not None
    assert "bytes per token" in drawn.axes[0].get_xlabel()
    assert plot(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
