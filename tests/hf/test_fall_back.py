"""Families that are not ours, run by transformers' own code over our cache: the same logits, and exact to the bit."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvist.base.errors import ConfigError
from kvist.evals.verify import Verifier
from kvist.hf import config as hf_config
from kvist.hf.decoder import HfDecoder
from kvist.runtime.runner import Runner
from kvist.service.loaded import open_model
from oracle import feed, tokens_of

VOCAB, PREFILL, STEPS = 99, 72, 32
SMALL = {
    "vocab_size": VOCAB,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Norms behind and not before; factors everywhere; LayerNorm, GELU and ties; parallel parts and scaled logits; windows.
CASES = {
    "olmo2": SMALL,
    "granite": SMALL | {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    "starcoder2": SMALL | {"tie_word_embeddings": True},
    "cohere": SMALL | {"logit_scale": 2.0},
    "olmo3": SMALL
    | {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


Written = Callable[[str], tuple[PreTrainedModel, Path]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(kind: str) -> tuple[PreTrainedModel, Path]:
        if kind not in made:
            config = AutoConfig.for_model(kind, **CASES.get(kind, SMALL))
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                noise = torch.empty(parameter.shape).normal_(generator=generator)
                parameter.data.copy_(parameter.data + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
            directory = tmp_path_factory.mktemp("hf") / kind
            model.save_pretrained(directory)
            made[kind] = model, directory
        return made[kind]

    return get


@pytest.mark.parametrize("kind", CASES)
def test_logits_are_those_of_transformers(kind: str, written: Written) -> None:
    model, directory = written(kind)
    loaded = open_model(str(directory))
    assert isinstance(loaded.model, HfDecoder)
    tokens = tokens_of(random.Random(0), PREFILL + STEPS, VOCAB)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    assert float(expected.std()) > 0.02
    runner = Runner(loaded.model, loaded.layout, 8, loaded.backend)
    found = feed(runner, runner.manager.open(), tokens, [PREFILL] + [1] * STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kv", "weights"), [("fp32", None), ("turbo4", None), ("fp32", "int8")])
@pytest.mark.parametrize("kind", CASES)
def test_verify(kind: str, kv: str, weights: str | None, written: Written) -> None:
    loaded = open_model(str(written(kind)[1]), kv=kv, weights=weights)
    assert loaded.model.is_packed == (weights is not None)
    checks = list(Verifier(loaded, length=160, steps=3, trials=2).run())
    assert [check for check in checks if not check.passed] == []


def test_windows_are_the_cache_s(written: Written) -> None:
    loaded = open_model(str(written("olmo3")[1]))
    assert loaded.config.windows == (20, 0, 20)
    assert [window.size for window in loaded.layout.windows] == [20]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("opt", "does not run over a cache"), ("bloom", "layers of this model"), ("falcon", "does not run over a cache")],
)
def test_what_does_not_go_through_the_interface_is_refused(kind: str, reason: str, written: Written) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_model(str(written(kind)[1]))


def test_without_transformers(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_config, "is_installed", lambda: False)
    with pytest.raises(
        ConfigError, match=r"'olmo2' is not supported .*; with pip install -e '\.\[hf\]' in Kvist's checkout"
    ):
        open_model(str(written("olmo2")[1]))


def test_what_transformers_does_not_know_either(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(ConfigError, match=r"'martian' is not supported .* nor does .*: transformers cannot read it: "):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match=r"'vit' is not supported .* continues no text"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_key_value_heads", 10**4000, r"num_key_value_heads should be within 2\^53, got 1000"),
        ("max_position_embeddings", 2**60, r"max_position_embeddings should be within 2\^53"),
        ("vocab_size", 2**40, "vocab_size must be from 1 to 16,777,216, got 1099511627776"),
    ],
)
def test_absurd_numbers_are_refused_in_one_line(name: str, value: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AutoConfig.for_model("granite").to_dict() | {name: value}))
    with pytest.raises(ConfigError, match=said) as refusal:
        hf_config.load_hf_config(tmp_path)
    assert len(str(refusal.value)) <= 400


def test_a_key_with_two_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "granite", "vocab_size": 100, "vocab_size": 200}')
    with pytest.raises(ConfigError, match=r"config\.json says 'vocab_size' twice, 100 and 200"):
        hf_config.load_hf_config(tmp_path)


def test_the_config_says_what_decides_the_mathematics(written: Written) -> None:
    config = open_model(str(written("granite")[1])).config
    assert isinstance(config, hf_config.HfConfig)
    assert '"residual_multiplier": 0.7' in config.raw
    assert config.version in repr(config)
