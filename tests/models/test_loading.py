"""From files to parameters and back: every number in its place, and one line for each way a checkpoint can be wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_checkpoints import CASES, Written
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvist.base.errors import ConfigError, KvistError, WeightsError
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.families import load_config
from kvist.models.load import build, export, load, randomize, stored_dtype
from kvist.ops.backend import Backend, select
from kvist.weights.checkpoint import Checkpoint, save
from oracle import GPT2, LLAMA, QWEN3

CONFIGS = [
    LLAMA,
    replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, tied=True),
    QWEN3,
    GPT2,
    replace(GPT2, tied=False),
]


@pytest.fixture(scope="module")
def operators() -> Backend:
    return select("cpu", torch.float32, 64, 64, "reference")


def loaded(directory: Path, operators: Backend, dtype: torch.dtype | None = None) -> Decoder:
    return load(directory, load_config(directory), operators, dtype)


@pytest.mark.parametrize("config", CONFIGS)
def test_slots_cover_each_number_of_each_parameter_once(config: ModelConfig, operators: Backend) -> None:
    model = build(config, operators, torch.float32)
    covered = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    names = [slot.name for slot in model.slots()]
    assert len(set(names)) == len(names)
    for slot in model.slots():
        rows, *rest = reversed(slot.shape) if slot.transposed else slot.shape
        place = covered[slot.parameter][slot.start : slot.start + rows]
        assert tuple(place.shape) == (rows, *rest)
        place += 1
    assert all(bool((times == 1).all()) for times in covered.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_linears_and_head_are_all_products_of_a_step(config: ModelConfig, operators: Backend) -> None:
    model = randomize(build(config, operators, torch.float32), seed=0)
    products = [*model.linears(), (model.head_weight(), None)]
    seen = {weight.data_ptr() for weight, _ in products}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    looked_up = {"positions.weight"} if config.tied else {"positions.weight", "embed.weight"}
    assert {name for name, p in matrices.items() if p.data_ptr() not in seen} <= looked_up
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name)
    assert sum(bias.numel() for _, bias in products if bias is not None) == biases


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_exported_is_what_was_loaded(
    case: str, written: Callable[[str], Written], operators: Backend, tmp_path: Path
) -> None:
    theirs = written(case)
    model = loaded(theirs.directory, operators)
    shutil.copy(theirs.directory / "config.json", tmp_path)
    save(tmp_path / "model.safetensors", export(model))
    assert export(model).keys() == load_file(theirs.directory / "model.safetensors").keys()
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = theirs.model.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    again = loaded(tmp_path, operators)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_shards_load_as_one_file_does(written: Callable[[str], Written], operators: Backend, tmp_path: Path) -> None:
    theirs = written("qwen3-80")
    theirs.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole = dict(loaded(theirs.directory, operators).named_parameters())
    for name, parameter in loaded(tmp_path, operators).named_parameters():
        assert torch.equal(parameter, whole[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_to_the_dtype_asked_for_and_kept_as_stored_else(
    dtype: torch.dtype, written: Callable[[str], Written], operators: Backend, tmp_path: Path
) -> None:
    theirs = written("gpt2-8")
    model = loaded(theirs.directory, operators, dtype)
    expected = theirs.model.state_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in export(model).items())
    shutil.copy(theirs.directory / "config.json", tmp_path)
    save(tmp_path / "model.safetensors", export(model))
    assert stored_dtype(Checkpoint(tmp_path)) is dtype
    assert {parameter.dtype for parameter in loaded(tmp_path, operators).parameters()} == {dtype}


def damaged(theirs: Written, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the checkpoint with its tensors changed."""
    tensors = load_file(theirs.directory / "model.safetensors")
    change(tensors)
    shutil.copy(theirs.directory / "config.json", folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


NORM, WQ = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda t: t.pop(WQ), f"tensor '{WQ}' is missing"),
        (lambda t: [t.pop(WQ), t.pop(NORM)], f"tensor '{WQ}' and 1 more is missing"),
        (lambda t: t.clear(), r"says \d layers, and the weight files hold 0 tensors"),
        (lambda t: t.update({"x": torch.zeros(1)}), "hold 'x', which a llama model .* has no place for"),
        (lambda t: t.update({"a": torch.zeros(1), "b": torch.zeros(1)}), "hold 'a' and 1 more"),
        (lambda t: t.update({NORM: torch.zeros(1, 64)}), rf"'{NORM}' has shape \[1, 64\], config.json says \[64\]"),
        (lambda t: t.update({WQ: torch.zeros(64, 65)}), rf"'{WQ}' has shape \[64, 65\], config.json says \[64, 64\]"),
        (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)}), f"'{NORM}' is of dtype I8"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    change: Callable[[dict[str, Tensor]], object],
    finding: str,
    written: Callable[[str], Written],
    operators: Backend,
    tmp_path: Path,
) -> None:
    directory = damaged(written("llama-8-scaled"), tmp_path, change)
    with pytest.raises(WeightsError, match=finding) as refusal:
        loaded(directory, operators)
    assert "\n" not in str(refusal.value)


def test_nothing_is_allocated_for_weights_that_do_not_fit(
    written: Callable[[str], Written], operators: Backend, tmp_path: Path
) -> None:
    """A damaged size asks for 16 TiB; what is wrong is said before that is tried."""
    theirs = written("llama-8-scaled")
    config = json.loads((theirs.directory / "config.json").read_text())
    directory = damaged(theirs, tmp_path, lambda tensors: None)
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 2**24, "intermediate_size": 2**24}))
    with pytest.raises(WeightsError, match=r"has shape .* config\.json says"):
        loaded(directory, operators)


def test_tensors_that_are_computed_rather_than_learned_are_passed_over(
    written: Callable[[str], Written], operators: Backend, tmp_path: Path
) -> None:
    """The first GPT-2 checkpoints hold masks, and no `transformer.` in front of their names."""
    theirs = written("gpt2-8")

    def as_of_old(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    directory = damaged(theirs, tmp_path, as_of_old)
    expected = dict(loaded(theirs.directory, operators).named_parameters())
    for name, parameter in loaded(directory, operators).named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_head_stored_beside_the_embedding_it_is_tied_to_must_be_that_embedding(
    written: Callable[[str], Written], operators: Backend, tmp_path: Path
) -> None:
    theirs = written("qwen2-64")
    embedding = theirs.model.get_input_embeddings().weight.detach()
    directory = damaged(theirs, tmp_path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(loaded(directory, operators).head_weight(), embedding)
    other = embedding.clone()
    other[3, 4] += 1
    directory = damaged(theirs, tmp_path, lambda tensors: tensors.update({"lm_head.weight": other}))
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' is stored and differs"):
        loaded(directory, operators)


def test_a_directory_without_its_files_is_named(tmp_path: Path, operators: Backend) -> None:
    with pytest.raises(KvistError, match=r"config\.json does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: the key 'model_type' is missing"):
        load_config(tmp_path)


def test_random_weights_come_from_their_seed(operators: Backend) -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in randomize(build(GPT2, operators, torch.float32), seed).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
