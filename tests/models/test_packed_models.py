"""Decoders with packed weights: the same as decoders over the numbers that the packed weights hold, but for the
rounding of activations; and kept on disk."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_checkpoints import VOCAB, Written

from kvist.base.errors import ConfigError, WeightsError
from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.view import PagedViews
from kvist.evals.verify import Verifier
from kvist.models.families import load_config
from kvist.models.linear import Weight, uniform, weights_of
from kvist.models.load import export, load, load_packed
from kvist.models.plain import PlainActivations
from kvist.ops import packed
from kvist.ops.backend import select
from kvist.runtime.runner import Runner
from kvist.service.loaded import open_model
from kvist.service.packing import packed_path
from kvist.weights.checkpoint import stamp_of
from oracle import QWEN3, feed, fresh, make_runner, tokens_of

CASES = (
    "llama-8-scaled",
    "llama-48-biased",
    "qwen2-64",
    "qwen3-80",
    "phi3-partial",
    "smollm3",
    "mistral-window",
    "gpt2-64-exact-gelu",
    "gemma2",
    "gemma3",
    "gemma4-small",
    "gemma4-shared-tied",
    "neox",
    "phi2",
    "stablelm",
    "qwen3-moe",
)


def unpacked(directory: Path, model) -> torch.nn.Module:
    """A float32 decoder over the numbers that a packed one holds."""
    plain = load(directory, model.config, PlainActivations(), torch.float32)
    for dense, held in zip(weights_of(plain).values(), weights_of(model).values(), strict=True):
        dense.weight.data.copy_(packed.get_rows(held.codes, held.form))
    return plain


def distance(a: torch.Tensor, b: torch.Tensor, case: str) -> float:
    """Relative, of all rows; with experts, of most: rounding may choose others for some."""
    if case == "qwen3-moe":
        return float(((a - b).norm(dim=1) / b.norm(dim=1)).median())
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, bits: int, written: Callable[[str], Written]) -> None:
    directory = written(case).directory
    config = load_config(directory)
    backend = select("cpu", torch.float32, config.head_dim, 64)
    model = load_packed(directory, config, backend, uniform(bits))
    assert model.weights == f"int{bits}"
    layout = plan_layout(config.layer_specs(), codec("fp32"))
    tokens = tokens_of(random.Random(0), 100, VOCAB)
    ours = fresh(Runner(model, layout, 4, backend), tokens)
    same = fresh(Runner(unpacked(directory, model), layout, 4, backend), tokens)
    lost = distance(ours, same, case)
    assert 1e-4 < lost < 8e-2, "activations are rounded to 8 bits, and nothing else is different"
    theirs = written(case).logits(tokens)
    assert distance(ours, theirs, case) < (0.1 if bits == 8 else 0.6)


@pytest.mark.parametrize("case", ["llama-8-scaled", "gpt2-64-exact-gelu", "gemma4-large"])
def test_rows_in_floating_point(case: str, written: Callable[[str], Written]) -> None:
    """Nothing but the weights is rounded to few bits, and all is exact."""
    directory = written(case).directory
    loaded = open_model(str(directory), weights="int8", activations="bf16")
    tokens = tokens_of(random.Random(0), 100, VOCAB)
    ours = fresh(Runner(loaded.model, loaded.layout, 4, loaded.backend), tokens)
    held = unpacked(directory, loaded.model)
    same = fresh(Runner(held, loaded.layout, 4, loaded.backend), tokens)
    errors = (ours - same).norm(dim=1) / same.norm(dim=1)
    assert 1e-6 < float(errors.median()) < 2e-2, "rounding to bfloat16, no more"
    coarse = open_model(str(directory), weights="int8")
    coarser = fresh(Runner(coarse.model, coarse.layout, 4, coarse.backend), tokens)
    assert float(((coarser - same).norm(dim=1) / same.norm(dim=1)).median()) > 1.2 * float(errors.median())
    checks = list(Verifier(loaded, length=100, steps=3, trials=2).run())
    assert [check for check in checks if not check.passed] == []
    for how in ({"activations": "int4", "weights": "int8"}, {"activations": "bf16"}):
        with pytest.raises(ConfigError, match="--activations is int8 or bf16, and says something of packed weights"):
            open_model(str(directory), **how)


@pytest.mark.parametrize("kv", ["fp32", "bf16", "turbo4", "k=int8,v=turbo3"])
def test_all_layers_at_once_have_the_bits_of_layer_after_layer(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, again = (make_runner(QWEN3, torch.float32, kv, bits=8) for _ in range(2))
    tokens = tokens_of(random.Random(3), 200)
    calls = []
    operator = runner.backend.packed_layers

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return operator(*arguments)

    object.__setattr__(runner.backend, "packed_layers", counted)
    together = feed(runner, runner.manager.open(), tokens, [150] + [1] * 50)
    assert calls == [150] + [1] * 50
    monkeypatch.setattr(PagedViews, "operands", None)
    assert torch.equal(feed(again, again.manager.open(), tokens, [97] + [1] * 103), together)
    assert len(calls) == 51


def test_where_codecs_differ_layers_run_one_by_one() -> None:
    runner = make_runner(QWEN3, torch.float32, "turbo4,0:fp32", bits=8)
    assert runner.store.operands is None
    assert make_runner(QWEN3, torch.float32, "turbo4", bits=8).store.operands is not None


def test_packed_weights_stand_side_by_side() -> None:
    model = make_runner(QWEN3, bits=8).model
    codes = [weight.codes for weight in weights_of(model).values()]
    starts = [tensor.data_ptr() for tensor in codes]
    assert all(start % 64 == 0 for start in starts)
    assert starts == sorted(starts)
    assert starts[-1] + codes[-1].nbytes - starts[0] < sum(tensor.nbytes for tensor in codes) + 64 * len(codes)


def test_what_packing_lost_is_told(written: Callable[[str], Written]) -> None:
    directory = written("qwen2-64").directory
    config = load_config(directory)
    backend = select("cpu", torch.float32, config.head_dim, 64)
    for bits, most in ((8, 0.007), (4, 0.09)):
        model = load_packed(directory, config, backend, uniform(bits))
        plain = dict(load(directory, config, backend, torch.float32).named_parameters())
        lost = total = 0.0
        for name, module in model.named_modules():
            if isinstance(module, Weight):
                true = plain[f"{name}.weight"]
                lost += float((packed.get_rows(module.codes, module.form) - true).square().sum())
                total += float(true.square().sum())
        assert model.packing_loss == pytest.approx((lost / total) ** 0.5, rel=1e-3)
        assert 0.5 * most < model.packing_loss < most


def test_a_packed_model_is_not_written_as_a_checkpoint() -> None:
    with pytest.raises(WeightsError, match="without --weights"):
        export(make_runner(QWEN3, bits=8).model)


def test_kept_on_disk_and_made_anew(written: Callable[[str], Written], tmp_path, monkeypatch) -> None:
    """The second time the file is read; one that is damaged, or of other weights, is not."""
    monkeypatch.setattr("kvist.service.packing.writable_cache_folder", lambda: tmp_path)
    directory = written("qwen2-64").directory
    first = open_model(str(directory), weights="int8")
    path = packed_path(directory, first.config, "int8", stamp_of(directory))
    made = path.stat().st_ino
    tokens = tokens_of(random.Random(1), 80, VOCAB)

    def logits():
        loaded = open_model(str(directory), weights="int8")
        assert loaded.model.packing_loss == pytest.approx(first.model.packing_loss, rel=1e-3)
        return fresh(loaded.engine(loaded.room(100)).runner, tokens)

    expected = fresh(first.engine(first.room(100)).runner, tokens)
    assert torch.equal(logits(), expected)
    assert path.stat().st_ino == made
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", whole[8:], b"\0" * 64):
        path.write_bytes(damaged)
        assert torch.equal(logits(), expected)
        assert path.stat().st_size == len(whole), "made anew"
    other = open_model(str(directory), weights="int4")
    assert other.model.weights == "int4"
    assert len(list(path.parent.iterdir())) == 2
