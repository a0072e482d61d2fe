"""Initial weights, decay and Muon, by numbers that follow from their definitions."""

from dataclasses import replace

import pytest
import torch
from runs import GPT2, SMALL

from kvist.models.decoder import Decoder
from kvist.models.families import read_config
from kvist.models.load import build
from kvist.train.dense import DenseActivations, Dropout
from kvist.train.optimizer import Optimizer, initialize
from kvist.train.settings import Method, TrainSettings


def _model(settings: TrainSettings, seed: int = 0) -> Decoder:
    config = read_config(settings.config_json(50), "here")
    model = build(config, DenseActivations(Dropout(0.0)), torch.float32)
    initialize(model, seed)
    return model.requires_grad_(True)


def test_initial_weights_have_their_deviations() -> None:
    model = _model(replace(GPT2, hidden_size=128, intermediate_size=256))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    assert float(weights["blocks.0.attention.qkv.weight"].std()) == pytest.approx(128**-0.5, rel=0.03)
    assert float(weights["blocks.1.down.weight"].std()) == pytest.approx(256**-0.5 / 2, rel=0.03)
    assert float(weights["embed.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert bool((weights["blocks.0.mlp_norm.weight"] == 1).all())
    assert bool((weights["blocks.0.up.bias"] == 0).all())


def test_initial_weights_follow_from_the_seed() -> None:
    first, again, other = _model(SMALL, 3), _model(SMALL, 3), _model(SMALL, 4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head_weight(), other.head_weight())


@pytest.mark.parametrize("method", list(Method))
def test_only_matrices_decay(method: Method) -> None:
    settings = replace(SMALL, method=method, weight_decay=0.5)
    model = _model(settings)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    Optimizer(model, settings).step(0.1)
    for name, weight in model.named_parameters():
        kept = 0.95 if weight.dim() >= 2 else 1.0
        torch.testing.assert_close(weight.detach(), before[name] * kept)


def test_adamw_takes_the_first_step_that_its_formula_says() -> None:
    settings = replace(SMALL, method=Method.ADAMW, weight_decay=0.0)
    model = _model(settings)
    weight = model.head_weight()
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    Optimizer(model, settings).step(0.01)
    # Corrected for their start at zero the moments are g and g², so the step is the rate whatever g is.
    torch.testing.assert_close(weight.detach(), before - 0.01)


def test_muon_makes_all_singular_values_of_a_step_alike() -> None:
    settings = replace(SMALL, weight_decay=0.0)
    model = _model(settings)
    matrix = model.linears()[0][0]
    before = matrix.detach().clone()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(matrix.shape, generator=generator) * torch.logspace(-1, 1, matrix.shape[1])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix.grad = gradient.clone()
    Optimizer(model, settings).step(0.01)
    sizes = torch.linalg.svdvals((before - matrix).detach())
    given = torch.linalg.svdvals(gradient)
    assert float(given[0] / given[-1]) > 20
    assert float(sizes[0] / sizes[-1]) < 3
    # Scaled so that a number of the step is about a fifth of the rate, as AdamW's are.
    rms = float((before - matrix).detach().square().mean().sqrt())
    assert rms == pytest.approx(0.2 * 0.01, rel=0.3)
