"""The benchmark of vector search: what it measures, with faiss and without."""

import json
import sys

import pytest
import torch
import typer

from kvist.base.errors import ConfigError
from kvist.bench import vectors
from kvist.bench.vectors import DATA, Data, clustered, has_faiss, hidden_states, isotropic, recall, run
from kvist.cli.bench import vectors as verb


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "QUERIES", 20)
    monkeypatch.setattr(vectors, "TIMED", 10)
    monkeypatch.setattr(vectors, "ROUNDS", 2)
    monkeypatch.setitem(DATA, "small", lambda: clustered(32, 600))


def check(data: Data, dim: int, count: int) -> None:
    assert data.base.shape == (count, dim)
    assert data.queries.shape == (20, dim)
    for x in (data.base, data.queries):
        assert x.norm(dim=1) == pytest.approx(1.0, abs=1e-5)
    assert float((data.queries @ data.base.T).max()) < 1 - 1e-6


def test_data_are_what_they_are_called() -> None:
    even, uneven = isotropic(64, 2000), clustered(64, 2000)
    check(even, 64, 2000)
    check(uneven, 64, 2000)
    assert float((even.queries @ even.base.T).amax(1).mean()) < 0.55
    assert float((uneven.queries @ uneven.base.T).amax(1).mean()) > 0.8
    spread = uneven.base.std(0)
    assert float(spread.max() / spread.min()) > 4
    hidden = hidden_states()
    check(hidden, 256, len(hidden.base))
    assert len(hidden.base) > 5000


def test_recall_counts_the_best_among_the_first() -> None:
    found, exact = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), torch.tensor([1, 6, 0])
    assert [recall(found, exact, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def run_small() -> dict[str, dict[str, float]]:
    """Values by engine and bits, then unit."""
    report = run(["small"], lambda what: None)
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {row["what"] for row in facts["rows"]} == {f"vectors small {bits} bits 600" for bits in (4, 2)} or {
        row["shape"] for row in facts["rows"]
    } == {"clustered-32"}
    values: dict[str, dict[str, float]] = {}
    for row in facts["rows"]:
        values.setdefault(f"{row['engine']} {row['what'].split()[2]}", {})[row["unit"]] = row["value"]
    return values


def test_without_faiss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vectors, "has_faiss", lambda: False)
    values = run_small()
    assert set(values) == {"kvist 4", "kvist 2", "exact 4", "exact 2"}
    assert values["exact 4"]["recall 1@1"] == 1
    assert values["kvist 4"]["recall 1@10"] == 1
    assert values["kvist 4"]["bytes a vector"] == 20
    assert values["exact 4"]["bytes a vector"] == 128
    assert "s to index" not in values["exact 4"]
    app = typer.Typer()
    app.command()(verb)
    monkeypatch.setattr(sys, "argv", ["vectors", "--data", "small", "--json"])
    app(standalone_mode=False)
    said = capsys.readouterr()
    assert "pip install -e '.[bench]' in Kvist's checkout" in said.err
    assert json.loads(said.out)["ratios"] == []


@pytest.mark.skipif(not has_faiss(), reason="faiss is not installed: pip install -e '.[bench]'")
def test_beside_faiss() -> None:
    values = run_small()
    assert set(values) == {
        *(f"{engine} {bits}" for engine in ("kvist", "exact", "faiss PQ") for bits in (4, 2)),
        "faiss SQ 4",
    }
    for bits in (4, 2):
        assert values[f"faiss PQ {bits}"]["bytes a vector"] == 32 * bits / 8
        assert values[f"faiss PQ {bits}"]["recall 1@10"] > 0.5
        assert values[f"faiss PQ {bits}"]["s to index"] > 0


def test_unknown_data() -> None:
    with pytest.raises(ConfigError, match="no data 'glove'; choose among isotropic-200, "):
        run(["glove"], print)
