"""Adapters as PEFT itself writes and merges them: every key of its configs is applied, inert, or refused by name."""

import copy
import dataclasses
import json
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from hf_checkpoints import VOCAB, Written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvist.base.errors import ConfigError, KvistError, WeightsError
from kvist.models.lora import CONFIG, FILE, load_adapter
from kvist.models.peft import KEYS, PeftConfig
from kvist.service.loaded import open_model

warnings.filterwarnings("ignore", module="peft")
NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def adapted(theirs: Written, folder: Path, **config: object) -> tuple[Path, dict[str, Tensor]]:
    """An adapter that PEFT wrote, its numbers random, and what PEFT adds to each weight when it has loaded it."""
    torch.manual_seed(1)
    facts = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(copy.deepcopy(theirs.model), peft.LoraConfig(**facts | config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs.model), folder)
    merged, base = loaded.merge_and_unload().state_dict(), theirs.model.state_dict()
    changed = {name: merged[name] - base[name] for name in base}
    return folder, {name: delta for name, delta in changed.items() if delta.any()}


def assert_as_peft(adapter: Path, expected: dict[str, Tensor]) -> None:
    deltas = load_adapter(adapter).deltas
    assert deltas.keys() == expected.keys()
    for name, delta in deltas.items():
        own = delta.matrix()
        torch.testing.assert_close(
            own if own.shape == expected[name].shape else own.T, expected[name], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("llama-48-biased", {}),
        ("qwen3-80", {"use_rslora": True, "alpha_pattern": {r"layers\.[01]\..*q_proj": 64, "q_proj": 2}}),
        ("qwen3-80", {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, ".*v_proj": 6}, "lora_alpha": 3}),
        ("llama-48-biased", {"rank_pattern": {"layers.1.*": 2, "up_proj": 3}, "alpha_pattern": {".*proj": 99}}),
        (
            "gpt2-8",
            {
                "fan_in_fan_out": True,
                "target_modules": ["c_attn", "c_fc"],
                "alpha_pattern": {r"h\.\d\.attn\.c_attn": 32},
            },
        ),
        ("neox", {"target_modules": ["query_key_value"], "alpha_pattern": {"attention.query_key_value": 2}}),
        ("gemma3", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
        ("phi3-partial", {"target_modules": r".*\.(qkv_proj|down_proj)", "exclude_modules": r".*\.0\..*"}),
        ("llama-48-biased", {"layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama-48-biased", {"layers_to_transform": 2}),
        ("qwen3-80", {"init_lora_weights": "gaussian"}),
        ("qwen3-80", {"init_lora_weights": "orthogonal"}),
        ("qwen3-80", {"init_lora_weights": "mica"}),
        ("qwen3-80", {"init_lora_weights": False, "lora_dropout": 0.5}),
    ],
)
def test_what_peft_adds(
    case: str, config: dict[str, object], written: Callable[[str], Written], tmp_path: Path
) -> None:
    adapter, expected = adapted(written(case), tmp_path / "a", **config)
    assert expected
    assert_as_peft(adapter, expected)


PARTS = st.sampled_from(
    [
        "layers",
        r"\d",
        "1",
        "[02]",
        "self_attn",
        ".*",
        "mlp",
        "q_proj",
        "(q|v)_proj",
        r"\.",
        ".",
        "up_proj",
        "^model",
        "$",
    ]
)
PATTERNS = st.dictionaries(st.lists(PARTS, min_size=1, max_size=4).map(".".join), st.integers(1, 64), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(ranks=PATTERNS, alphas=PATTERNS, target=st.sampled_from(["q_proj", "layers.1.mlp.up_proj"]))
def test_patterns_are_pefts_own(ranks: dict[str, int], alphas: dict[str, int], target: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(
        json.dumps(
            {"rank_pattern": ranks, "alpha_pattern": alphas, "r": 5, "lora_alpha": 7, "target_modules": [target]}
        )
    )
    own, theirs = PeftConfig(tmp_path), peft.LoraConfig(target_modules=[target])
    for layer in range(3):
        for module in (f"model.layers.{layer}.{name}" for name in NAMES):
            assert own.rank(module) == ranks.get(get_pattern_key(ranks, module), 5)
            assert own.alpha(module) == alphas.get(get_pattern_key(alphas, module), 7)
            found = check_target_module_exists(theirs, module)
            assert own.changes(module) == bool(found)


def test_each_key_of_pefts_config_has_its_place() -> None:
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= KEYS.keys()


REFUSED = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa_niter_4",
    "trainable_token_indices": [1],
    "use_dora": True,
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {},
    "monteclora_config": {},
    "velora_config": {},
    "ensure_weight_tying": True,
    "layers_to_transform": [1, True],
    "rank_pattern": {"(": 4},
    "alpha_pattern": {"q_proj": "much"},
    "target_modules": [5],
    "exclude_modules": "q_proj{e}",
    "layers_pattern": "[[:alpha:]]",
    "r": 10**300,
    "lora_alpha": [8],
    "a new key": 1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_would_change_the_maths_is_refused_by_name(key: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"target_modules": ["q_proj"]} | {key: REFUSED[key]}))
    with pytest.raises(ConfigError, match=re.escape(key)) as refusal:
        PeftConfig(tmp_path)
    assert len(str(refusal.value)) <= 400


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "corda", "lora_ga", "PiSSA", {}, 1])
def test_adapters_of_a_changed_base_are_refused(init: object, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"init_lora_weights": init}))
    with pytest.raises(ConfigError, match="the base was changed with the adapter"):
        PeftConfig(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "value"), [("a\nb", "much"), ("a" * 900, "much"), (f"(?P={'x' * 900})", 4), ("(?P<a\nb>c)", 4)]
)
def test_a_refusal_shows_a_pattern_in_one_line(pattern: str, value: object, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"alpha_pattern": {pattern: value}}))
    with pytest.raises(ConfigError, match="alpha_pattern: ") as refusal:
        PeftConfig(tmp_path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 400


def test_a_key_with_two_values_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"r": 8, "lora_alpha": 16, "lora_alpha": 32}')
    with pytest.raises(KvistError, match=r"adapter_config\.json says 'lora_alpha' twice, 16 and 32"):
        PeftConfig(tmp_path)
    (tmp_path / CONFIG).write_text('{"r": 8, "lora_alpha": 16, "lora_alpha": 16}')
    assert PeftConfig(tmp_path).alpha("q_proj") == 16


def test_a_pattern_that_would_match_for_ever_ends(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"alpha_pattern": {"(?:(?:a|aa)+)+b": 1}}))
    start = time.process_time()
    with pytest.raises(ConfigError, match="take too long to match"):
        PeftConfig(tmp_path).alpha("a" * 300)
    assert time.process_time() - start < 10


def test_tensors_that_the_config_leaves_out(written: Callable[[str], Written], tmp_path: Path) -> None:
    adapter, _ = adapted(written("qwen3-80"), tmp_path / "a")
    config = json.loads((adapter / CONFIG).read_text())
    for change, finding in (
        ({"target_modules": ["q_proj"]}, "leave 'model.layers.0.* out"),
        ({"rank_pattern": {"q_proj": 2}}, "should be of rank 2, and its tensors are of 4"),
    ):
        (adapter / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=finding):
            load_adapter(adapter)


@pytest.mark.parametrize("case", ["qwen3-80", "llama-48-biased"])
def test_what_lies_beside_an_adapter_unchanged_is_no_change(
    case: str, written: Callable[[str], Written], tmp_path: Path
) -> None:
    """The head (which is the embedding where it is tied to it), as PEFT writes it beside an adapter."""
    theirs = written(case)
    adapter, expected = adapted(theirs, tmp_path / "a")
    tensors, base = load_file(adapter / FILE), theirs.model.state_dict()
    copies = {"lm_head.base_layer.weight": "lm_head.weight", "model.embed_tokens.weight": "model.embed_tokens.weight"}
    for stored, own in copies.items():
        tensors[f"base_model.model.{stored}"] = base[own].clone().half()
    save_file(tensors, adapter / FILE)
    assert_as_peft(adapter, expected)
    directory = str(theirs.directory)
    for how in ({"adapter": adapter}, {"adapters": {"a": adapter}}):
        assert open_model(directory, **how).config.vocab_size == VOCAB
    for stored in copies:
        changed = dict(tensors)
        changed[f"base_model.model.{stored}"] = tensors[f"base_model.model.{stored}"].clone()
        changed[f"base_model.model.{stored}"][50, 7] += 1
        save_file(changed, adapter / FILE)
        for how in ({"adapter": adapter}, {"adapters": {"a": adapter}}):
            with pytest.raises(WeightsError, match="is not the base's"):
                open_model(directory, **how)
    save_file(tensors | {"base_model.model.model.norm.base_layer.weight": torch.ones(3)}, adapter / FILE)
    with pytest.raises(KvistError, match="is not the base's"):
        open_model(directory, adapter=adapter)
