import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from kvist.base.errors import ConfigError, NumericsError
from kvist.bench import attention
from kvist.bench.machine import Memory, Samples, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.bench.shapes import SHAPES, AttentionShape, attention_shape_named, shape_named
from kvist.cache.spec import key_value, latent, tied

SMALL = AttentionShape("small", 4, key_value(2, 32))
COUNT = 3


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(attention, "attention_shape_named", lambda name: SMALL)
    monkeypatch.setattr(attention, "_CYCLE_BYTES", COUNT * 64 * 2 * 2 * 32 * 2)
    monkeypatch.setattr(attention, "PREFILL_QUERIES", 32)
    monkeypatch.setattr(attention, "PREFILL_CONTEXT", 96)


@pytest.mark.parametrize(("kvs", "full"), [(["bf16", "turbo4"], "bf16"), (["fp32"], "fp32"), (["int8"], "bf16")])
def test_a_whole_run(small, kvs, full):
    report = attention.run(["small"], [100, 600], kvs, rounds=3)
    whats = ["attention decode small 100", "attention decode small 600", "attention prefill of 32 small 96"]
    pairs = [(f"kvist {kv}", f"torch {full}") for kv in kvs]
    pairs += [(f"kvist {kv}", f"kvist {full}") for kv in kvs if kv != full and full in kvs]
    assert [(ratio.what, ratio.a, ratio.b) for ratio in report.ratios] == [
        (what, *pair) for what in whats for pair in pairs
    ]
    assert all(ratio.value > 0 for ratio in report.ratios)
    for what in whats:
        rows = [row for row in report.rows if row.what == what]
        assert {(row.engine, row.kv) for row in rows} == {*(("kvist", kv) for kv in kvs), ("torch sdpa", full)}
        assert {str(row.context) for row in rows} == {what.split()[-1]}
        assert all(row.spread[0] <= row.value <= row.spread[1] for row in rows)
    assert report.machine["read_gb_s"] > 0
    assert json.loads(json.dumps(report.to_json()))["ratios"][0]["what"] == whats[0]


@pytest.mark.parametrize("spec", [latent(64, 32), tied(2, 32)], ids=["latent", "tied"])
def test_keys_that_are_made_of_values(small, monkeypatch, spec):
    """PyTorch is given the keys, and its result is near before anything is timed."""
    monkeypatch.setattr(attention, "attention_shape_named", lambda name: AttentionShape("made", 4, spec))
    report = attention.run(["made"], [100], ["bf16", "turbo4"], rounds=3)
    assert len(report.ratios) == 2 * 3
    assert report.rows[1].value == pytest.approx(
        100 * sum(s.heads * s.dim for s in spec.streams) * 2 / (report.rows[0].value * 1e-6) / 1e9
    )


@pytest.mark.parametrize(
    ("kv", "layer_bytes"),
    [
        ("bf16", 600 * 2 * 2 * 32 * 2),
        # Nine blocks in codes of 4 bits with a scale of 16 for 32 of them, and 24 tokens as they are.
        ("turbo4", 9 * 64 * 2 * 2 * (16 + 2) + 24 * 2 * 2 * 32 * 2),
    ],
)
def test_rates_follow_from_times(small, kv, layer_bytes):
    report = attention.run(["small"], [600], [kv], rounds=3)
    rows = {row.unit: row for row in report.rows if row.what == "attention decode small 600" and row.engine == "kvist"}
    assert rows["GB/s"].value == pytest.approx(layer_bytes / (rows["us a layer"].value * 1e-6) / 1e9)


@pytest.mark.parametrize(("kv", "operator"), [("bf16", "attend"), ("turbo4", "attend_coded")])
def test_a_kernel_that_is_wrong_is_not_timed(small, monkeypatch, kv, operator):
    ops = attention.select("cpu", torch.bfloat16, 32, 64)
    wrong = replace(ops, **{operator: lambda *arguments: 2 * getattr(ops, operator)(*arguments)})
    monkeypatch.setattr(attention, "select", lambda *arguments: wrong)
    with pytest.raises(NumericsError, match=rf"differs from PyTorch's .*small, {kv}"):
        attention.run(["small"], [100], [kv], rounds=3)


def test_unknown_names(small):
    with pytest.raises(ConfigError, match="no KV codec 'int3'"):
        attention.run(["small"], [100], ["int3"])
    with pytest.raises(ConfigError, match=r"no shape 'gpt-5'; choose one of smollm2-135m, "):
        shape_named("gpt-5")
    with pytest.raises(ConfigError, match=r"no shape 'gpt-5'; choose one of .*deepseek-v2-lite"):
        attention_shape_named("gpt-5")


def test_shapes_are_consistent():
    for shape in SHAPES:
        assert shape_named(shape.name) is shape
        assert shape.heads * shape.head_dim == shape.hidden
        assert shape.heads % shape.kv_heads == 0


def test_interleaving_measures_each_function_in_every_round():
    calls: list[str] = []
    first, second = interleave([lambda: calls.append("a"), lambda: calls.append("b")], 4)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert len(first.values) == len(second.values) == 4
    assert all(value >= 0 for value in first.values)


def test_samples():
    samples = Samples((4.0, 1.0, 3.0, 2.0, 5.0))
    assert samples.median == 3
    assert samples.spread == (1.5, 4.5)
    assert samples.over(Samples((2.0, 1.0, 1.0, 1.0, 10.0))).values == (2, 1, 3, 2, 0.5)


def test_memory_bandwidth():
    memory = Memory()
    memory.read()
    assert memory.gb_s(0.1) == pytest.approx(memory.buffer.nbytes / 0.1 / 1e9)


def test_a_printed_report_has_every_number():
    report = Report({"processor": "abacus", "read_gb_s": 33.3})
    report.rows.append(Row("attention decode x 100", "kvist", "x", "none", "bf16", 100, 1, 12.5, "us", (12.0, 13.5)))
    report.ratios.append(Ratio("attention decode x 100", "kvist bf16", "torch bf16", 4.321))
    stream = io.StringIO()
    report.print(Console(file=stream, width=120))
    text = stream.getvalue()
    for expected in ("attention decode x 100", "12.5", "12 to 13.5", "kvist bf16 as torch bf16", "4.32", "33.3"):
        assert expected in text
