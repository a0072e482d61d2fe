"""The walk through two steps shows what really went through them."""

from test_verify import GPT2, QWEN3, random_model

from kvist.base.events import Committed, Reserved
from kvist.evals.trace import trace
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
