"""`verify` passes on sound caches of every family and fails on caches broken on purpose."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.manager import CacheManager
from kvist.cache.store import Store
from kvist.cache.view import PagedView
from kvist.evals.verify import Verifier
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.runtime import runner as runner_module
from kvist.runtime.batch import build_batch
from kvist.service.loaded import Loaded, select_backend

LLAMA = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=48,
    intermediate_size=72,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    max_positions=700,
    norm_eps=1e-5,
    activation=Activation.SILU,
    rope=Rope(10_000.0),
)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, head_dim=16, tied=True)
GPT2 = dataclasses.replace(
    LLAMA,
    family="gpt2",
    kv_heads=6,
    activation=Activation.GELU_TANH,
    rope=None,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32, kv: str = "fp32") -> Loaded:
    layout = plan_layout(config.layer_specs(), codec(kv))
    backend = select_backend(config, torch.float32)
    model = randomize(build(config, backend, dtype), seed=3, std=0.2)
    return Loaded("random", config, model, layout, backend, Path())


@pytest.mark.parametrize(
    ("config", "dtype", "kv"),
    [
        (LLAMA, torch.float32, "fp32"),
        (QWEN3, torch.float32, "fp32"),
        (GPT2, torch.float32, "fp32"),
        (LLAMA, torch.bfloat16, "bf16"),
        (QWEN3, torch.float32, "fp16"),
    ],
    ids=["llama", "qwen3", "gpt2", "bf16", "fp16 cache"],
)
def test_sound_caches_pass(config: ModelConfig, dtype: torch.dtype, kv: str) -> None:
    checks = list(Verifier(random_model(config, dtype, kv), length=530, steps=3, trials=2).run())
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 9
    assert all(check.compared > 0 for check in checks)
    evidence = {check.name: check.evidence for check in checks}
    assert evidence["forked = alone"]["blocks_copied_on_write"] > 0
    assert evidence["rolled back = never written"]["tokens_taken_back"] > 0
    assert evidence["batched = alone"]["side_by_side"] > 1
    assert evidence["chunked = whole"]["chunks"] > 4
    assert evidence["prefixes shared, preempted = alone"]["tokens_shared"] > 500
    assert evidence["prefixes shared, preempted = alone"]["preemptions"] > 0


def failures(loaded: Loaded) -> set[str]:
    checks = Verifier(loaded, length=150, steps=4, trials=3).run()
    failed = [check for check in checks if not check.passed]
    assert all("differs_at" in check.evidence or "tolerance" in check.evidence for check in failed)
    return {check.name.split(":")[0].split(" =")[0] for check in failed}


def test_a_wrong_position_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(works, *rest):
        batch = build_batch(works, *rest)
        behind = batch.positions if len(works[0].tokens) > 1 else batch.positions + 1
        return dataclasses.replace(batch, positions=behind)

    monkeypatch.setattr(runner_module, "build_batch", shifted)
    assert {"greedy", "seeded"} <= failures(random_model(LLAMA))


def test_a_position_wrong_everywhere_fails_against_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(works, *rest):
        batch = build_batch(works, *rest)
        return dataclasses.replace(batch, positions=batch.positions // 2)

    monkeypatch.setattr(runner_module, "build_batch", shifted)
    assert failures(random_model(LLAMA)) == {"paged"}


def test_a_stale_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "copy", lambda self, copies: None)
    assert failures(random_model(LLAMA)) == {"forked", "prefixes shared, preempted"}


def test_a_token_that_is_not_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    write = PagedView.write

    def forgetful(self: PagedView, k: torch.Tensor, v: torch.Tensor) -> None:
        slots = self.step.slots[0].clone()
        if int(self.step.starts[-1]) == 1:
            slots[0] = -1
        write(dataclasses.replace(self, step=dataclasses.replace(self.step, slots=[slots])), k, v)

    monkeypatch.setattr(PagedView, "write", forgetful)
    assert {"greedy", "seeded"} <= failures(random_model(LLAMA))


def test_a_shared_block_written_in_place_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheManager, "_shared", lambda self, lease, first, end: [])
    monkeypatch.setattr(CacheManager, "check", lambda self: None)
    assert not Verifier(random_model(LLAMA), length=150, steps=4, trials=3).forks().passed
