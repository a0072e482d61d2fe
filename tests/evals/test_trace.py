"""The walk through two steps shows what really went through them."""

import pytest
import torch
from test_verify import GPT2, LLAMA, QWEN3, random_model

from kvist.base.events import Committed, Reserved
from kvist.evals.trace import trace
from kvist.models.config import ModelConfig
from kvist.models.linear import uniform, weights_of
from kvist.ops import packed
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner
from kvist.runtime.widths import probe


def test_shapes_of_prefill_and_decode() -> None:
    loaded = random_model(QWEN3)
    widths = probe(loaded.model.linears())  # which of them agree is a fact of the machine
    wide, narrow = widths.fit(65), widths.fit(1)
    prefill, decode = trace(loaded, list(range(1, 61)) + [3] * 5)
    shapes = {row.name: row.shape for row in prefill.tensors}
    assert prefill.title == "prefill: 65 tokens"
    assert shapes["tokens"] == shapes["positions"] == shapes["slots"] == (wide,)
    assert shapes["tables"] == (1, 2)
    assert shapes["k"] == shapes["v"] == (wide, 2, 16)
    assert shapes["q"] == shapes["attention"] == (wide, 6, 16)
    assert shapes["blocks.0.attention.qkv"] == (wide, (6 + 2 + 2) * 16)
    assert shapes["blocks.0.gate_up"] == (wide, 2 * 72)
    assert shapes["logits"] == (1, 61)
    assert {row.name: row.shape for row in decode.tensors}["tokens"] == (narrow,)
    assert all(row.meaning for row in prefill.tensors + decode.tensors)


def test_the_cache_grows_by_what_the_events_say() -> None:
    loaded = random_model(QWEN3)
    prefill, decode = trace(loaded, [5] * 64)
    assert prefill.events == [Reserved(0, 64, 1, 0), Committed(0, 64, 64)]
    assert decode.events == [Reserved(0, 1, 1, 0), Committed(0, 1, 65)]
    assert (prefill.tokens, prefill.blocks, decode.tokens, decode.blocks) == (64, 1, 65, 2)
    # Two layers, keys and values of two heads of 16 numbers, four bytes each.
    assert decode.bytes == 2 * 64 * 2 * 2 * 2 * 16 * 4


def test_a_trace_leaves_no_hook_behind() -> None:
    loaded = random_model(GPT2)
    trace(loaded, [1, 2, 3])
    for module in loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_prompt_wider_than_a_step_shows_its_last_step() -> None:
    loaded = random_model(GPT2)
    prefill, _ = trace(loaded, [1] * 600)
    assert prefill.tokens == 600
    assert prefill.title == "prefill: 88 tokens"


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_packed_weights_show_what_others_do_and_the_same_bits(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = random_model(config)
    plain = [row.name for row in trace(loaded, [1, 2, 3])[0].tensors]
    loaded.model.pack(uniform(8), loaded.backend)
    for weight in weights_of(loaded.model).values():
        for first in range(0, weight.form.rows, 7):
            rows = torch.randn(
                min(7, weight.form.rows - first), weight.columns, generator=torch.Generator().manual_seed(first)
            )
            packed.put_rows(weight.codes, weight.form, first, rows)
    runner = loaded.engine(loaded.room(8, sequences=2)).runner
    fused = runner.run([Work(runner.manager.open(), [1, 2, 3])])[0]
    seen = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, works: seen.append(run(self, works)) or seen[-1])
    prefill, decode = trace(loaded, [1, 2, 3])
    assert [row.name for row in prefill.tensors] == [row.name for row in decode.tensors] == plain
    assert "blocks.0.gate_up" in plain
    assert torch.equal(seen[0][0], fused)
    again = runner.run([Work(runner.manager.open(), [1, 2, 3])])[0]
    assert torch.equal(again, fused)
    assert all(block.fuses for block in loaded.model.blocks)
