import random

import pytest
import torch

from kvist.bench import decode
from kvist.bench.filled import FilledCache
from kvist.bench.machine import Samples
from kvist.bench.report import Report
from kvist.service.loaded import Loaded, open_model
from oracle import QWEN3, feed, fresh, make_runner, tokens_of


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return open_model(None)


def test_a_whole_run(loaded, monkeypatch):
    monkeypatch.setattr(decode, "PREFILL", 64)
    monkeypatch.setattr(decode, "PREFILL_DEPTH", 128)
    heard: list[str] = []
    report = decode.run([("small", loaded)], [300], ["bf16", "turbo4"], 3, heard.append)
    assert heard[0] == "small: filling the caches"
    decoded = {(row.kv, row.context): row for row in report.rows if row.what.startswith("decode")}
    assert set(decoded) == {(kv, depth) for kv in ("bf16", "turbo4") for depth in (0, 128, 256)}
    assert {row.context for row in report.rows if row.what.startswith("prefill")} == {0, 128}
    assert all(row.value > 0 for row in decoded.values())
    pairs = {(ratio.what, ratio.a, ratio.b) for ratio in report.ratios}
    assert ("decode small", "kvist turbo4 at 256", "kvist turbo4 at 0") in pairs
    assert ("prefill of 64 small", "kvist bf16 at 128", "kvist bf16 at 0") in pairs
    assert ("decode small 256", "kvist turbo4", "kvist bf16") in pairs
    # Only a lossy codec encodes, and it says what share of a step that takes.
    assert {(row.kv, row.unit) for row in report.rows if row.what == "encoding small"} == {
        ("turbo4", "us a token"),
        ("turbo4", "of a decode step"),
    }


def test_ratios_follow_from_times(loaded):
    report = Report({})
    bench = decode._Bench(report, "small", loaded, ["bf16"], [256], 3)
    sequences = [s for s in bench.sequences() if s.tokens in (0, 256)]
    bench._compare("decode", sequences, [Samples((0.1, 0.2, 0.3)), Samples((0.4, 0.4, 0.4))], 1)
    assert [row.value for row in report.rows] == pytest.approx([5, 2.5])
    assert [ratio.value for ratio in report.ratios] == pytest.approx([0.5])


@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_filled_cache_is_read_like_a_computed_one(kv, backend_name):
    """A model's own keys and values, put in by hand, give the logits that the model gives after computing them."""
    runner = make_runner(QWEN3, torch.float32, kv, backend=backend_name)
    tokens = tokens_of(random.Random(0), 150)
    expected = fresh(runner, tokens)
    vectors: list[list[torch.Tensor]] = [[] for _ in range(QWEN3.layers)]
    seen = make_runner(QWEN3, torch.float32, kv, backend=backend_name)
    for block, kept in zip(seen.model.blocks, vectors, strict=True):
        block.attention.register_forward_pre_hook(lambda module, args, kept=kept: args[2] and _keep(args[2], kept))
    fresh(seen, tokens)
    lease, cache = runner.manager.open(), FilledCache.of(runner)
    for views in [cache.step(lease, 149)]:
        for view, (k, v) in zip(views, vectors, strict=True):
            view.write(k[:149], v[:149])
    runner.manager.commit(lease, 149)
    assert torch.equal(feed(runner, lease, tokens[149:]), expected[149:])


def _keep(view: object, kept: list[torch.Tensor]) -> None:
    write = view.write  # type: ignore[attr-defined]

    def watched(k: torch.Tensor, v: torch.Tensor) -> None:
        kept.extend((k.clone(), v.clone()))
        write(k, v)

    object.__setattr__(view, "write", watched)
