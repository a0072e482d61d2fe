"""`kvist bench products` and `start`: what they compare, and that a wrong product or a failing process is noticed."""

import sys
from pathlib import Path

import pytest
import torch

from kvist.base.errors import KvistError
from kvist.base.files import cache_folder
from kvist.bench import products, start
from kvist.bench.shapes import Shape
from kvist.ops.backend import select

TINY = Shape("tiny", 2, 64, 96, 4, 2, 16, 320, tied=True)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    select("cpu", torch.float32, 64, 64)
    (tmp_path / "ops").symlink_to(cache_folder() / "ops")  # another cache, but not another compilation
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    for module in ("models", "products"):
        monkeypatch.setattr(f"kvist.bench.{module}.shape_named", lambda name: TINY)
    monkeypatch.setattr(products, "_CYCLE_BYTES", 1 << 16)
    monkeypatch.setattr(products, "_AMOUNT", 1e6)


def test_every_product_is_measured_and_held_against_the_other() -> None:
    report = products.run(["tiny"], 3, lambda what: None)
    whats = {row.what for row in report.rows}
    parts = [f"tiny {part}, {rows}" for part in ("qkv", "out", "gate and up", "down", "head") for rows in ROWS]
    assert whats == {*parts, "tiny whole step, 1 row"}
    assert {row.unit for row in report.rows if row.what.endswith(" 1 row")} == {"GB/s"}
    assert {ratio.b for ratio in report.ratios} == {"reading memory", "onednn int8"}
    assert all(row.value > 0 for row in report.rows)
    assert report.machine["read_gb_s"] > 0


ROWS = ("1 row", "8 rows", "64 rows", "512 rows")


def test_a_product_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products._Library, "multiply", lambda self, rows: torch.ones(len(rows), len(self._scales)))
    assert "onednn's products are wrong here: off by" in str(products.run(["tiny"], 3, lambda what: None).machine)
    monkeypatch.setattr(products, "put_rows", lambda codes, form, first, weight: None)
    with pytest.raises(AssertionError, match="qkv, 8 rows: off by 1"):
        products.run(["tiny"], 3, lambda what: None)


def test_first_tokens() -> None:
    report = start.run(["tiny"], ["bf16"], 1, lambda what: None)
    bare, whole, more = (row.value for row in report.rows)
    assert whole == pytest.approx(bare + more)
    assert min(bare, whole) > 0


def test_a_process_that_says_nothing() -> None:
    with pytest.raises(KvistError, match="no luck"):
        start.first_output([sys.executable, "-c", "raise SystemExit('no luck')"])
