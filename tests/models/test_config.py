"""Configs as transformers reads them, or not at all."""

import json
import math
from collections.abc import Callable

import pytest
from hf_checkpoints import CASES, Written
from transformers import AutoConfig

from kvist.base.errors import ConfigError
from kvist.models.config import Activation, Llama3Scaling, ModelConfig, Rope
from kvist.models.families import read_config
from kvist.models.inert import INERT


def saved(case: str, written: Callable[[str], Written]) -> dict[str, object]:
    """The `config.json` that transformers wrote."""
    return json.loads((written(case).directory / "config.json").read_text())


def test_a_config_is_read_key_by_key(written: Callable[[str], Written]) -> None:
    assert read_config(saved("llama-48-biased", written), "config.json") == ModelConfig(
        family="llama",
        vocab_size=99,
        hidden_size=96,
        intermediate_size=172,
        layers=3,
        heads=4,
        kv_heads=1,
        head_dim=48,
        max_positions=512,
        norm_eps=1e-6,
        activation=Activation.SILU,
        rope=Rope(500.0, linear_factor=2.0),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=True,
    )
    scaled = read_config(saved("llama-8-scaled", written), "config.json")
    assert scaled.rope == Rope(10_000.0, llama3=Llama3Scaling(8.0, 1.0, 4.0, 64))


@pytest.mark.parametrize("case", list(CASES))
def test_a_key_left_out_means_what_it_means_to_transformers(case: str, written: Callable[[str], Written]) -> None:
    """Each key in turn is dropped: the config is then refused, or it is the one transformers makes of the rest."""
    raw = saved(case, written)
    fixed = {"model_type"}
    if "per_layer_config" in raw:  # which belongs to these layers
        fixed |= {"per_layer_config", "layer_types", "num_hidden_layers"}
    else:  # transformers fails on them where the number of layers is another
        for key in ("layer_types", "no_rope_layers"):
            raw.pop(key, None)
    if "long" in case or "short" in case:  # transformers fails on factors of another length
        fixed |= {"hidden_size", "num_attention_heads"}
    kept = 0
    for key in raw.keys() - fixed:
        rest = {name: value for name, value in raw.items() if name != key}
        theirs = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in rest.items() if k != "model_type"})
        try:
            ours = read_config(rest, "config.json")
        except ConfigError:
            assert key not in INERT
            continue
        assert ours == read_config(theirs.to_dict(), "transformers"), key
        kept += 1
    assert kept > len(raw) // 2


@pytest.mark.parametrize(
    ("case", "legacy"),
    [
        ("llama-8-scaled", {"rope_theta": 10_000.0, "rope_scaling": {"rope_type": "llama3"}}),
        ("llama-48-biased", {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}}),
        ("qwen2-64", {"rope_theta": 10_000, "rope_scaling": None}),
        ("mistral-128", {}),
    ],
)
def test_configs_from_before_rope_parameters_read_the_same(
    case: str, legacy: dict[str, object], written: Callable[[str], Written]
) -> None:
    raw = saved(case, written)
    parameters = raw.pop("rope_parameters")
    if case == "llama-8-scaled":
        parameters.pop("rope_theta")
        legacy = legacy | {"rope_scaling": parameters}
    expected = read_config(saved(case, written), "config.json")
    assert read_config(raw | legacy, "config.json") == expected
    theirs = AutoConfig.for_model(raw["model_type"], **{k: v for k, v in (raw | legacy).items() if k != "model_type"})
    assert read_config(theirs.to_dict(), "transformers") == expected


def test_longrope_of_older_checkpoints(written: Callable[[str], Written]) -> None:
    """The factors are chosen by the model's context alone; attention grows by how much longer it has become."""
    raw, expected = saved("phi3-long", written), read_config(saved("phi3-long", written), "config.json")
    parameters = raw.pop("rope_parameters")
    factors = {name: parameters[name] for name in ("short_factor", "long_factor")}
    legacy = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "rope_scaling": factors | {"type": "su"}}
    assert read_config(raw | legacy, "config.json") == expected
    assert expected.rope.divisors == tuple(factors["long_factor"])
    assert expected.rope.scale == math.sqrt(1 + math.log(512 / 16) / math.log(16))
    short = read_config(raw | legacy | {"original_max_position_embeddings": 512}, "config.json").rope
    assert (short.divisors, short.scale) == (tuple(factors["short_factor"]), 1.0)
    for change, finding in (
        ({"type": "su", "short_factor": [1.0]}, "'long_factor' is missing"),
        (factors | {"type": "su", "long_factor": ["a"]}, "long_factor should be a list of numbers"),
        (factors | {"type": "su", "long_factor": [1.0, 2.0]}, "2 divisors for 8 frequencies"),
        (factors | {"type": "su", "attention_factor": 0.0}, "attention_factor must be positive"),
        (factors | {"type": "su", "short_mscale": 1.2}, "short_mscale"),
    ):
        with pytest.raises(ConfigError, match=finding):
            read_config(raw | legacy | {"rope_scaling": change}, "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("case", "change", "finding"),
    [
        ("llama-8-scaled", {"model_type": "mamba"}, r"architecture 'mamba' is not supported \(gpt2, llama, "),
        ("llama-8-scaled", {"model_type": None}, "the key 'model_type' is missing"),
        ("llama-8-scaled", {"model_type": 3}, "model_type should be of type str, got 3"),
        ("llama-8-scaled", {"hidden_size": None}, "the key 'hidden_size' is missing"),
        ("llama-8-scaled", {"hidden_size": "64"}, "hidden_size should be of type int, got '64'"),
        ("llama-8-scaled", {"hidden_size": 64.0}, "hidden_size should be of type int, got 64.0"),
        ("llama-8-scaled", {"num_hidden_layers": True}, "num_hidden_layers should be of type int, got True"),
        ("llama-8-scaled", {"attention_bias": 1}, "attention_bias should be of type bool, got 1"),
        ("llama-8-scaled", {"rms_norm_eps": "1e-6"}, "rms_norm_eps should be of type float"),
        ("llama-8-scaled", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite, got nan"),
        ("llama-8-scaled", {"rms_norm_eps": -1e-6}, "epsilon must be finite and not negative"),
        ("llama-8-scaled", {"hidden_size": 0}, "hidden_size must be from 1"),
        ("llama-8-scaled", {"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ("llama-8-scaled", {"num_hidden_layers": -1}, "layers must be from 1"),
        ("llama-8-scaled", {"num_hidden_layers": 10**9}, "layers must be from 1 to 16,777,216"),
        ("llama-8-scaled", {"num_hidden_layers": 10**6}, "at most 1,024 layers"),
        ("llama-8-scaled", {"vocab_size": 10**12}, "vocab_size must be from 1 to 16,777,216"),
        ("llama-8-scaled", {"max_position_embeddings": 0}, "the context must be from 1"),
        ("llama-8-scaled", {"num_key_value_heads": 3}, "8 query heads do not divide among 3 KV heads"),
        ("llama-8-scaled", {"head_dim": 7}, "even number of a head's 7 dimensions"),
        ("llama-8-scaled", {"hidden_act": "relu2"}, r"hidden_act='relu2' is not supported \(silu, swish\)"),
        ("llama-8-scaled", {"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported \(silu, swish\)"),
        ("llama-8-scaled", {"add_cross_attention": True}, "unknown key 'add_cross_attention'"),
        ("llama-8-scaled", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \('gptq'\)"),
        ("llama-8-scaled", {"hidden_size": 10**300}, r"hidden_size should be within 2\^53, got 1000000000"),
        ("llama-8-scaled", {"rms_norm_eps": -(10**300)}, r"rms_norm_eps should be within 2\^53"),
        ("llama-8-scaled", {"rope_theta": [1] * 9999}, r"rope_theta should be of type float, got \[1, 1, 1, \.\.\.\]"),
        ("llama-8-scaled", {"k" * 9999 + str(n): 1 for n in range(99)}, "and 96 more, which may change"),
        ("qwen3-moe", {"num_local_experts": 16_000}, "at most 32,768 experts"),
        ("gemma2", {"sliding_window_size": 5}, "sliding_window_size=5 changes the maths"),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "which is no kind of layer"),
        ("phi3-long", {"mlp_bias": True}, "unknown key 'mlp_bias'"),
        ("phi3-long", {"attention_bias": True}, "unknown key 'attention_bias'"),
        ("phi3-long", {"full_attn_mod": 2}, "unknown key 'full_attn_mod'"),
        ("qwen2-64", {"dual_chunk_attention_config": {}}, "unknown key 'dual_chunk_attention_config'"),
        ("llama-8-scaled", {"rope_interleaved": True}, "rope_interleaved=True changes the maths"),
        ("llama-8-scaled", {"logit_scale": 2.0}, "unknown key 'logit_scale', which may change the maths"),
        ("llama-8-scaled", {"b": 1, "a": 2}, "unknown keys 'a', 'b', which"),
        ("llama-8-scaled", {"sliding_window": 100}, "sliding_window=100 below max_position_embeddings=512"),
        ("llama-8-scaled", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope'"),
        ("llama-8-scaled", {"rope_parameters": {"rope_type": "dynamic"}}, "RoPE scaling 'dynamic'"),
        (
            "llama-8-scaled",
            {"rope_parameters": {"rope_type": "linear"}},
            "rope parameters: the key 'factor' is missing",
        ),
        ("llama-8-scaled", {"rope_parameters": LLAMA3}, "'original_max_position_embeddings' is missing"),
        (
            "llama-8-scaled",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported",
        ),
        ("llama-8-scaled", {"rope_parameters": []}, "rope_parameters should be of type dict"),
        ("llama-8-scaled", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "both stand there"),
        ("llama-8-scaled", {"rope_parameters": {"rope_theta": 0.0}}, "rope_theta must be positive and finite, got 0.0"),
        ("llama-8-scaled", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta must be finite, got inf"),
        (
            "llama-8-scaled",
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
            "factor must be positive and finite, got 0.0",
        ),
        (
            "llama-8-scaled",
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 8}},
            "positive factors, the low one below the high",
        ),
        (
            "llama-8-scaled",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be at least 1",
        ),
        *(
            (case, {"partial_rotary_factor": share, "rope_parameters": None}, "partial_rotary_factor must lie between")
            for case in ("stablelm", "phi2", "phi3-long", "llama-8-scaled")
            for share in (0.0, -0.5, 1.5, 1e308)
        ),
        ("mistral-128", {"attention_bias": True}, "unknown key 'attention_bias'"),
        ("mistral-128", {"use_sliding_window": False}, "unknown key 'use_sliding_window'"),
        ("qwen2-64", {"use_mrope": True}, "use_mrope=True changes the maths"),
        ("qwen2-64", {"layer_types": ["full_attention", "sliding_attention"]}, "names 2 layers of 3"),
        ("qwen2-64", {"layer_types": ["full_attention", "chunked_attention"]}, "layer type 'chunked_attention'"),
        ("qwen3-80", {"layer_types": [{}]}, r"layer type \{\} is not supported"),
        ("gpt2-8", {"n_head": 7}, "n_embd=64 does not divide among n_head=7"),
        ("gpt2-8", {"n_head": 0}, "does not divide among n_head=0"),
        ("gpt2-8", {"scale_attn_weights": False}, "scale_attn_weights=False changes the maths"),
        ("gpt2-8", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True changes"),
        ("gpt2-8", {"activation_function": "silu"}, r"activation_function='silu' is not supported \(gelu, gelu_new, "),
        ("gpt2-8", {"hidden_act": "gelu"}, "unknown key 'hidden_act'"),
    ],
)
def test_what_would_change_the_maths_is_refused_in_one_line(
    case: str, change: dict[str, object], finding: str, written: Callable[[str], Written]
) -> None:
    with pytest.raises(ConfigError, match=finding) as refusal:
        read_config(saved(case, written) | change, "models/x/config.json")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 400


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_keys_whose_default_differs_between_families_must_be_stated(
    family: str, written: Callable[[str], Written]
) -> None:
    raw = saved({"mistral": "mistral-128", "qwen2": "qwen2-64", "qwen3": "qwen3-80"}[family], written)
    del raw["num_key_value_heads"]
    with pytest.raises(ConfigError, match="the key 'num_key_value_heads' is missing"):
        read_config(raw, "config.json")


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mistral-128", {"sliding_window": 512}),
        ("qwen2-64", {"sliding_window": 100, "use_sliding_window": False}),
        ("qwen2-64", {"sliding_window": 100, "use_mrope": False, "use_sliding_window": None}),
        ("llama-8-scaled", {"torch_dtype": "bfloat16", "_name_or_path": "x", "rope_interleaved": False}),
        ("llama-8-scaled", {"hidden_act": "swish"}),
        ("llama-8-scaled", {"pretraining_tp": 2, "max_sequence_length": 2048, "quantization_config": None, "z": None}),
        ("gpt2-8", {"n_special": 0, "predict_special_tokens": True, "_num_labels": 1, "output_past": True}),
        ("gemma2", {"cache_implementation": "hybrid", "sliding_window_size": 20}),
        ("gemma3", {"cache_implementation": "hybrid"}),
        ("phi3-long", {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "interpolate_factor": 1}),
        ("phi3-long", {"full_attn_mod": 1}),
        ("qwen2-64", {"attention_bias": True}),
        ("mistral-128", {"attention_bias": False}),
        ("deepseek", {"pretraining_tp": 4, "seq_aux": True, "aux_loss_alpha": 0.001}),
        ("gpt2-8", {"n_ctx": 128, "activation_function": "gelu_pytorch_tanh"}),
    ],
)
def test_what_changes_nothing_is_accepted(
    case: str, change: dict[str, object], written: Callable[[str], Written]
) -> None:
    raw = saved(case, written)
    assert read_config(raw | change, "config.json") == read_config(raw, "config.json")


def test_what_is_written_twice_in_two_spellings_is_read_once(written: Callable[[str], Written]) -> None:
    raw = saved("llama-8-scaled", written)
    assert read_config(raw | {"rope_scaling": raw["rope_parameters"]}, "c") == read_config(raw, "c")


# What a family's public checkpoints say beside its sizes, as published.
PUBLISHED = {
    "gpt2": {"n_special": 0, "predict_special_tokens": True, "task_specific_params": {}, "summary_type": "cls_index"},
    "llama": {"pretraining_tp": 2, "max_sequence_length": 2048, "rope_scaling": None, "temperature": 0.9},
    "mistral": {"sliding_window": 4096, "attention_dropout": 0.0, "max_position_embeddings": 32_768},
    "qwen2": {"use_mrope": False, "max_window_layers": 28, "use_sliding_window": False, "sliding_window": 131_072},
    "qwen3": {"attention_bias": False, "max_window_layers": 36, "rope_scaling": None},
    "qwen3_moe": {"output_router_logits": False, "router_aux_loss_coef": 0.001, "mlp_only_layers": []},
    "gemma2": {"cache_implementation": "hybrid", "sliding_window_size": 4096, "sliding_window": 4096},
    "gemma3_text": {"cache_implementation": "hybrid", "attn_logit_softcapping": None},
    "gemma4_text": {},
    "smollm3": {"pretraining_tp": 2, "max_window_layers": 28, "use_sliding_window": False},
    "phi": {"qk_layernorm": False, "embd_pdrop": 0.0},
    "phi3": {"attention_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    "gpt_neox": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "classifier_dropout": 0.1},
    "stablelm": {"rotary_scaling_factor": 1.0, "hidden_dropout": 0.0},
    "deepseek_v2": {"pretraining_tp": 1, "ep_size": 1, "scoring_func": "softmax", "seq_aux": True},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_familys_config_is_accepted_with_all_keys_that_transformers_has_for_it(family: str) -> None:
    """Of each family the config by default, as transformers writes it, and what is published beside it."""
    stated = {"num_experts_per_tok": 6} if family == "deepseek_v2" else {}  # which has no default
    raw = AutoConfig.for_model(family, **stated).to_dict()
    read = read_config(raw, "config.json")
    beside = PUBLISHED[family]
    same = {key: raw[key] for key in ("sliding_window", "max_position_embeddings") if key in raw and key in beside}
    if family == "qwen3_moe":
        assert read.experts.count == raw.get("num_local_experts", raw.get("num_experts"))
    assert read_config(raw | beside | same, "config.json") == read
    assert read_config(raw | dict.fromkeys(("nobody", "knows"), None), "config.json") == read
