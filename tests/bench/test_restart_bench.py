"""The benchmark of restarts, on a model so small that its figures mean nothing."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kvist.base.errors import KvistError
from kvist.bench import restart
from kvist.bench.models import random_model


def test_every_life_comes_to_the_same_bits() -> None:
    heard: list[str] = []
    report = restart.run("nanogpt-0.2m", None, ["restart"], 300, 64, 3, heard.append)
    assert [life.name for life in report.lives] == ["cold", "restart", "no page cache", "import"]
    assert report.same_bits
    assert [life.hits.get("disk", 0) for life in report.lives] == [0, 4, 4, 4]
    assert [life.computed for life in report.lives] == [315, 59, 59, 59]
    assert report.exported_bytes is not None
    assert report.exported_bytes > report.lives[0].kept_bytes
    assert len(heard) == 5
    shown = io.StringIO()
    report.print(Console(file=shown, width=160))
    assert "the same bits in every life" in shown.getvalue()
    found = json.loads(json.dumps(report.to_json()))
    assert found["same_bits"]
    assert found["lives"][0]["speedup"] == 1.0


def test_writing_and_isolation_are_measured(tmp_path: Path) -> None:
    loaded = random_model("nanogpt-0.2m", "bf16")
    report = restart.measure_writing("nanogpt-0.2m", loaded, tmp_path / "writing", 64, 3)
    assert [row.engine for row in report.rows] == ["memory", "memory and disk"]
    assert report.machine["written_blocks"] == 4 * restart.STREAMS  # of each round, and the one that is not counted
    found = restart.measure_isolation(loaded, tmp_path / "isolation", 6)
    assert (found.tokens, found.trials) == (256, 6)
    assert 0 <= found.another_told <= 1


def test_a_life_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(KvistError, match="the process 'cold' failed"):
        restart.run("nanogpt-0.2m", None, ["restart"], 300, 64, 3, lambda what: None)
