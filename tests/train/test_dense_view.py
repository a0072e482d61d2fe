"""The training view against attention written out, and dropout by its numbers."""

import math

import pytest
import torch

from kvist.train.dense import DenseActivations, DenseView, Dropout

ROWS, LENGTH, HEADS, DIM = 3, 7, 4, 8


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention in float64, one query at a time. `[T, heads, dim]`, rows of LENGTH tokens."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        seen = slice(t - t % LENGTH, t + 1)
        for head in range(q.shape[1]):
            keys, values = k[seen, head // group].double(), v[seen, head // group].double()
            out[t, head] = torch.softmax(keys @ q[t, head].double() * scale, -1) @ values
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_dense_view_attends_causally_within_each_row(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    q = torch.randn(ROWS * LENGTH, HEADS, DIM, generator=generator)
    k, v = (torch.randn(ROWS * LENGTH, kv_heads, DIM, generator=generator) for _ in range(2))
    view = DenseView(ROWS, Dropout(0.5))
    view.write(k, v)
    out = view.attend(q, 0.3)
    torch.testing.assert_close(out.double(), _attention(q, k, v, 0.3), rtol=0, atol=1e-6)
    # The tolerance tells a wrong scale apart.
    assert (out - _attention(q, k, v, 0.31)).abs().max() > 1e-4


def test_activations_have_the_values_and_slopes_of_their_formulas() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    activations = DenseActivations(Dropout(0.5))
    gated = activations.silu_mul(torch.cat((x, x + 1)))
    torch.testing.assert_close(gated, x / (1 + torch.exp(-x)) * (x + 1))
    exact = torch.tensor([0.5 * n * (1 + math.erf(n / math.sqrt(2))) for n in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(activations.gelu(x, tanh=False), exact)
    difference = (activations.gelu(x, tanh=True) - exact).abs().max()
    assert 1e-5 < difference < 1e-3
    x.requires_grad_(True)
    activations.gelu(x, tanh=False).sum().backward()
    assert x.grad is not None
    assert x.grad[16] == pytest.approx(0.5)


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    dropout, x = Dropout(0.25), torch.ones(40_000)
    dropout.begin(seed=1, step=5)
    dropped = dropout(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_dropout_masks_follow_from_seed_and_step() -> None:
    dropout, x = Dropout(0.25), torch.ones(1000)

    def masks(seed: int, step: int) -> torch.Tensor:
        dropout.begin(seed, step)
        return torch.stack((dropout(x), dropout(x)))

    first = masks(1, 5)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(masks(1, 6), first)
    assert not torch.equal(masks(2, 5), first)
    assert torch.equal(masks(1, 5), first)
    dropout.end()
    assert dropout(x) is x
