"""LoRA adapters: merged they are W + scale B A, for single rows of a batch nearly the same and exact to the bit."""

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_checkpoints import VOCAB, Written
from torch import Tensor

from kvist.base.errors import ConfigError, RequestError, WeightsError
from kvist.models.lora import CONFIG, FILE, load_adapter
from kvist.runtime.batch import Work
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request, Sampling
from kvist.runtime.runner import Runner
from kvist.service.identity import identify
from kvist.service.loaded import Loaded, open_model
from kvist.weights.checkpoint import save
from oracle import tokens_of

TARGETS = {
    "llama-48-biased": ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3-80": ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj"),
    "gpt2-8": ("attn.c_attn", "mlp.c_proj"),
    "gemma3": ("self_attn.q_proj", "mlp.down_proj"),
    "qwen3-moe": ("self_attn.q_proj", "mlp.gate"),
}
RANK = 4


def write_adapter(theirs: Written, targets: tuple[str, ...], folder: Path, seed: int, **config: object) -> Path:
    """An adapter of random numbers for some products of every layer."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, weight in theirs.model.state_dict().items():
        module = name.removesuffix(".weight")
        if not module.endswith(targets) or weight.dim() != 2:
            continue
        rows, columns = weight.shape if not module.endswith(("c_attn", "c_proj", "c_fc")) else weight.shape[::-1]
        for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            key = f"base_model.model.{module}.lora_{side}.weight"
            tensors[key] = 0.3 * torch.randn(shape, generator=generator)
    assert tensors
    folder.mkdir(parents=True)
    save(folder / FILE, tensors)
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(facts | config))
    return folder


def expected(theirs: Written, adapter: Path, tokens: list[int], scale: float = 2.0) -> Tensor:
    """What transformers computes with W + scale B A."""
    model, deltas = copy.deepcopy(theirs.model), load_adapter(adapter).deltas
    for name, parameter in model.named_parameters():
        if name in deltas:
            added = scale * deltas[name].up @ deltas[name].down
            parameter.data += added if added.shape == parameter.shape else added.T
    return Written(model, adapter).logits(tokens)


def logits(loaded: Loaded, asked: list[tuple[list[int], str]], alone: bool) -> list[Tensor]:
    """The logits of several sequences, each with its adapter, side by side in each step or one after another."""
    runner = Runner(loaded.model, loaded.layout, 40, loaded.backend, sequences=len(asked))
    leases = [runner.manager.open(adapter) for _, adapter in asked]
    found: list[list[Tensor]] = [[] for _ in asked]
    for start in range(0, 60, 12):
        works = [
            Work(lease, tokens[start : start + 12], 12, adapter=adapter)
            for lease, (tokens, adapter) in zip(leases, asked, strict=True)
        ]
        steps = [[work] for work in works] if alone else [works]
        rows = [row for step in steps for row in runner.run(step)]
        for own, part in zip(found, rows, strict=True):
            own.append(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("case", TARGETS)
def test_merged(case: str, written: Callable[[str], Written], tmp_path: Path) -> None:
    theirs = written(case)
    adapter = write_adapter(theirs, TARGETS[case], tmp_path / "a", 1)
    loaded = open_model(str(theirs.directory), adapter=adapter)
    tokens = tokens_of(random.Random(0), 60, VOCAB)
    (found,) = logits(loaded, [(tokens, "")], alone=True)
    torch.testing.assert_close(found, expected(theirs, adapter, tokens), rtol=0, atol=2e-4)
    assert (found - theirs.logits(tokens)).abs().max() > 0.1, "it does something"
    assert identify(loaded).adapter == load_adapter(adapter).id
    packed = open_model(str(theirs.directory), adapter=adapter, weights="int8")
    (nearly,) = logits(packed, [(tokens, "")], alone=True)
    assert float((nearly - found).norm() / found.norm()) < 0.2


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("case", TARGETS)
def test_mixed_in_one_batch(case: str, weights: str | None, written: Callable[[str], Written], tmp_path: Path) -> None:
    theirs, rng = written(case), random.Random(0)
    folders = {name: write_adapter(theirs, TARGETS[case], tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))}
    loaded = open_model(str(theirs.directory), adapters=folders, weights=weights)
    ids = loaded.adapters
    tokens = tokens_of(rng, 60, VOCAB)
    asked = [(tokens, ids["a"]), (tokens, ""), (tokens_of(rng, 60, VOCAB), ids["b"]), (tokens, ids["b"])]
    together, alone = logits(loaded, asked, alone=False), logits(loaded, asked, alone=True)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    assert (together[0] - together[1]).abs().max() > 0.1
    assert (together[0] - together[3]).abs().max() > 0.1
    if weights is None:
        torch.testing.assert_close(together[0], expected(theirs, folders["a"], tokens), rtol=0, atol=2e-4)
        torch.testing.assert_close(together[1], theirs.logits(tokens), rtol=0, atol=1e-4)
        torch.testing.assert_close(together[3], expected(theirs, folders["b"], tokens), rtol=0, atol=2e-4)


def test_nothing_cached_is_shared_between_adapters(written: Callable[[str], Written], tmp_path: Path) -> None:
    theirs = written("qwen3-80")
    adapter = write_adapter(theirs, TARGETS["qwen3-80"], tmp_path / "a", 1)
    loaded = open_model(str(theirs.directory), adapters={"a": adapter})
    engine = loaded.engine(loaded.room(300, sequences=3))
    prompt = tuple(tokens_of(random.Random(1), 150, VOCAB))
    engine.runner.manager.make_public(prompt)
    request = Request(prompt, 4, Sampling())
    answers, cached = [], []
    for name in ("", "a", "", "a"):
        sequence = engine.add(replace(request, adapter=loaded.adapters.get(name, "")))
        while not engine.idle:
            engine.step()
            engine.check()
        answers.append(sequence.new_tokens)
        cached.append(sequence.cached.prompt)
    assert cached[0] == cached[1] == 0
    assert min(cached[2:]) >= 128
    assert answers[0] == answers[2]
    assert answers[1] == answers[3] != answers[0]
    with pytest.raises(RequestError, match="no adapter"):
        engine.add(replace(request, adapter="martian"))
    with pytest.raises(RequestError, match="no adapter"):
        Engine(Runner(open_model(None).model, open_model(None).layout, 4, loaded.backend)).add(
            replace(request, adapter=loaded.adapters["a"], prompt=(1,))
        )


def test_scales(written: Callable[[str], Written], tmp_path: Path) -> None:
    theirs = written("qwen3-80")
    how = {"use_rslora": True, "alpha_pattern": {"layers.0.self_attn.k_proj": 2}}
    deltas = load_adapter(write_adapter(theirs, TARGETS["qwen3-80"], tmp_path / "a", 1, **how)).deltas
    assert deltas["model.layers.0.self_attn.k_proj.weight"].scale == 2 / RANK**0.5
    assert deltas["model.layers.1.self_attn.k_proj.weight"].scale == 8 / RANK**0.5


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' changes the maths"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"something": 1}, "unknown key 'something'"),
    ],
)
def test_other_kinds_are_refused(
    change: dict[str, object], finding: str, written: Callable[[str], Written], tmp_path: Path
) -> None:
    adapter = write_adapter(written("qwen3-80"), TARGETS["qwen3-80"], tmp_path / "a", 1, **change)
    with pytest.raises(ConfigError, match=finding):
        load_adapter(adapter)


def test_an_adapter_of_another_base(written: Callable[[str], Written], tmp_path: Path) -> None:
    adapter = write_adapter(written("qwen3-80"), TARGETS["qwen3-80"], tmp_path / "a", 1)
    for how in ({"adapter": adapter}, {"adapters": {"a": adapter}}):
        with pytest.raises(WeightsError, match=r"is an adapter of another model: .* of \[160, 96\], and this one has"):
            open_model(str(written("llama-48-biased").directory), **how)


def test_damaged_adapters(written: Callable[[str], Written], tmp_path: Path) -> None:
    adapter = write_adapter(written("qwen3-80"), TARGETS["qwen3-80"], tmp_path / "a", 1)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_"
    for tensors, finding in (
        ({f"{name}A.weight": torch.ones(4, 96)}, "lora_A alone"),
        ({f"{name}A.weight": torch.ones(4, 96), f"{name}B.weight": torch.ones(160, 3)}, r"lora_B \[160, 3\]"),
        ({"base_model.model.lm_head.lora_embedding_A": torch.ones(4, 96)}, "is no part of a LoRA adapter"),
    ):
        save(adapter / FILE, tensors)
        with pytest.raises(WeightsError, match=finding):
            load_adapter(adapter)


def test_what_only_merging_can_do(written: Callable[[str], Written], tmp_path: Path) -> None:
    theirs = written("deepseek")
    adapter = write_adapter(theirs, ("self_attn.kv_b_proj",), tmp_path / "a", 1)
    with pytest.raises(WeightsError, match="merge it into the weights instead"):
        open_model(str(theirs.directory), adapters={"a": adapter})
    tokens = tokens_of(random.Random(0), 60, VOCAB)
    (found,) = logits(open_model(str(theirs.directory), adapter=adapter), [(tokens, "")], alone=True)
    torch.testing.assert_close(found, expected(theirs, adapter, tokens), rtol=0, atol=2e-4)
