"""The cache benchmark measures what it says, in the documented form."""

import json
from pathlib import Path

import pytest

from kvist.bench.cache import growth, plot, run
from kvist.bench.models import random_model
from kvist.runtime.runner import Runner


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights are made here; the operators are the reference, which needs no build."""
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVIST_OPS", "reference")


def test_growth_recovers_exponents() -> None:
    lengths = [64, 256, 1024, 4096]
    assert growth(lengths, [3e-5 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    assert growth(lengths, [0.02] * 4) == pytest.approx(0.0)


def test_report_and_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[int] = []
    works = Runner.run

    def counted(self, step):
        steps.append(sum(len(work.tokens) for work in step))
        return works(self, step)

    monkeypatch.setattr(Runner, "run", counted)
    heard: list[str] = []
    report = run([("nanogpt-0.2m", random_model("nanogpt-0.2m", "fp32"))], [8, 24], heard.append)
    # Recomputing the token behind 24 others takes 25 rows, and the cached one a single row.
    assert 25 in steps
    assert steps.count(1) > 20
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert facts["machine"]["read_gb_s"] > 0
    assert {tuple(sorted(row)) for row in facts["rows"]} == {
        ("batch", "context", "engine", "kv", "shape", "spread", "unit", "value", "weights", "what")
    }
    assert all(row["what"].endswith(str(row["context"])) and row["shape"] == "nanogpt-0.2m" for row in facts["rows"])
    names = {ratio["what"] for ratio in facts["ratios"]}
    assert names == {f"{kind} nanogpt-0.2m {n}" for kind in ("next token", "whole text") for n in (8, 24)} | {
        "decode step nanogpt-0.2m 8"
    }
    assert len(heard) == 4
    plot(report, tmp_path / "cache.png")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")


def test_random_weights_are_made_once(tmp_path: Path) -> None:
    random_model("nanogpt-0.2m", "fp32")
    weights = next((tmp_path / "cache" / "shapes").rglob("model.safetensors"))
    made = weights.stat().st_mtime_ns
    loaded = random_model("nanogpt-0.2m", "fp32")
    assert weights.stat().st_mtime_ns == made
    parameters = sum(
        parameter.numel() for name, parameter in loaded.model.named_parameters() if "positions" not in name
    )
    assert parameters == pytest.approx(0.2e6, rel=0.05)
