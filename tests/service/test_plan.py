"""What a model takes, from its config alone: windows, sharing, tying, latents and codecs each save what they should."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.models.families import read_config
from kvist.service.plan import context_row, layer_kinds

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4096}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "sliding_window": 1024,
}
GEMMA4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 0,
}
DEEPSEEK = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "max_position_embeddings": 163_840,
}
LONG = 131_072


def ratio(config: dict[str, object], kv: str = "bf16", context: int = LONG) -> float:
    return context_row(read_config(config, "test"), kv, context).times_smaller


def test_a_full_cache_is_the_naive_one() -> None:
    assert ratio(LLAMA) == 1.0
    assert context_row(read_config(LLAMA, "x"), "bf16", 4096).nbytes == 16 * 2 * 8 * 64 * 2 * 4096


@pytest.mark.parametrize(("kv", "least", "most"), [("int8", 1.9, 2.0), ("turbo4", 3.7, 4.0), ("turbo2", 6.8, 8.0)])
def test_codecs(kv: str, least: float, most: float) -> None:
    assert least < ratio(LLAMA, kv) < most


def test_windows() -> None:
    assert ratio(MISTRAL) == LONG / 4096
    assert ratio(MISTRAL, context=LONG - 1) == pytest.approx(LONG / (4096 + 64), rel=1e-4), "a window cuts a block"
    assert ratio(MISTRAL, context=4096) == 1.0
    # 5 of 34 layers keep all, 29 a window of 1024.
    assert ratio(GEMMA3) == pytest.approx(34 * LONG / (5 * LONG + 29 * 1024), rel=1e-3)


def test_sharing_halves_what_is_kept() -> None:
    base = ratio(GEMMA4)
    # The last twelve of thirty layers keep nothing: ten windows and two of the five layers that keep all tokens.
    local, wide = 4 * 256, 4 * 512
    kept = 5 * wide * LONG + 25 * local * 512
    assert base == pytest.approx((5 * wide + 25 * local) * LONG / kept, rel=1e-3)
    shared = ratio(GEMMA4 | {"num_kv_shared_layers": 12})
    less = 3 * wide * LONG + 15 * local * 512
    assert shared / base == pytest.approx(kept / less, rel=1e-3)


def test_tying_halves_the_layers_that_keep_all() -> None:
    tied = ratio(GEMMA4 | {"attention_k_eq_v": True})
    local, wide = 4 * 256, 4 * 512
    assert tied / ratio(GEMMA4) == pytest.approx(
        (2 * 5 * wide * LONG + 2 * 25 * local * 512) / (5 * wide * LONG + 2 * 25 * local * 512), rel=1e-3
    )


def test_latents() -> None:
    # 16 heads of 192 and 128 numbers, of which 512 + 64 are kept.
    assert ratio(DEEPSEEK) == pytest.approx(16 * (192 + 128) / 576, rel=1e-6)
    assert ratio(DEEPSEEK, "turbo4") > 3.5 * ratio(DEEPSEEK)


def test_kinds_of_layers() -> None:
    kinds = layer_kinds(read_config(GEMMA4 | {"num_kv_shared_layers": 12, "attention_k_eq_v": True}, "x"))
    assert [(kind.layers, kind.numbers, kind.tokens) for kind in kinds] == [
        (15, 2048, 512),
        (3, 2048, 0),
        (10, 0, 512),
        (2, 0, 0),
    ]
    assert kinds[1].what == "keys are values: kv 4 x 512"


def test_the_verb_reads_nothing_but_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--context", "4096", "--kv", "turbo4", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["kinds"] == [
        {"what": "latent: rope 1 x 64, latent 1 x 512", "layers": 27, "numbers": 576, "tokens": 0}
    ]
    assert [row["times_smaller"] > 20 for row in found["rows"]] == [True]
    bf16, int8, int4 = (found["weights"][name] for name in ("bf16", "int8", "int4"))
    assert 1.7 < bf16 / int8 < 2
    assert 1.7 < int8 / int4 < 2
    text = CliRunner().invoke(app, ["plan", str(tmp_path)]).output
    assert "naive bf16" in text
    assert "131,072 tokens" in text
    refused = CliRunner().invoke(app, ["plan", str(tmp_path), "--kv", "martian"])
    assert "martian" in str(refused.exception)
