"""Which settings make a run, the learning rate over it, and the presets."""

import math
from dataclasses import replace

import pytest
from runs import GPT2, SMALL

from kvist.models.families import read_config
from kvist.train.settings import PRESETS, TrainError, TrainSettings, Vocabulary


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "rwkv"}, "'rwkv'"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"layers": -1}, "layers must be at least 1, got -1"),
        ({"hidden_size": 33}, "33 does not divide among 4 heads"),
        ({"kv_heads": 3}, "4 heads do not divide among 3 KV heads"),
        ({"heads": 8, "kv_heads": 8}, "multiple of 8"),
        ({"hidden_size": 4096}, "up to 512, got 1024"),
        ({"layers": 10**9}, "too many to train here"),
        ({"rows": 10**6}, "1,000,000 rows of 32 tokens are too much for one step"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": math.nan}, "learning rate"),
        ({"final_learning_rate": 0.5}, "learning rate"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"gradient_clip": math.nan}, "gradient_clip"),
        ({"warmup_share": 1.0}, "warmup_share must be at least 0 and below 1"),
        ({"short_share": -0.1}, "short_share must be at least 0"),
        ({"short_context": 5}, "short_context 5 must divide the context of 32"),
        ({"vocabulary": Vocabulary.BYTES, "vocab_size": 100}, "257 to 65,536 tokens, got 100"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_run_are_refused_in_one_line(changes: dict[str, object], says: str) -> None:
    with pytest.raises(TrainError) as refusal:
        replace(SMALL, **changes)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_gpt2_has_no_shared_kv_heads() -> None:
    with pytest.raises(TrainError, match="not 2"):
        replace(GPT2, kv_heads=2)


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    settings = replace(SMALL, steps=110, warmup_share=1 / 11, learning_rate=1e-2, final_learning_rate=1e-3)
    rates = [settings.learning_rate_at(step) for step in range(110)]
    assert rates[0] == pytest.approx(1e-2 / 11)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx((1e-2 + 1e-3) / 2)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)


def test_the_nanogpt_preset_is_the_published_recipe() -> None:
    preset = PRESETS["nanogpt"]
    assert (preset.layers, preset.heads, preset.hidden_size, preset.context) == (4, 4, 128, 64)
    assert (preset.rows, preset.steps, preset.learning_rate, preset.beta2) == (12, 2000, 1e-3, 0.99)
    assert PRESETS["default"].steps * PRESETS["default"].tokens_per_step <= preset.steps * preset.tokens_per_step


@pytest.mark.parametrize("settings", [*PRESETS.values(), SMALL, GPT2])
def test_the_engine_reads_the_config_that_is_written(settings: TrainSettings) -> None:
    config = read_config(settings.config_json(65), "config.json")
    assert (config.family, config.layers, config.heads) == (settings.family, settings.layers, settings.heads)
    assert (config.kv_heads, config.head_dim) == (settings.kv_heads, settings.head_dim)
    assert (config.max_positions, config.vocab_size) == (settings.context, 65)
    assert config.intermediate_size == settings.intermediate_size
