"""Rotary positions: against their definition in float64, and with bits that no history changes."""

import random

import pytest
import torch
from torch import Tensor

from kvist.models.config import Llama3Scaling, Rope
from kvist.models.layers import RopeTable, inverse_frequencies

LLAMA3 = Rope(500_000.0, llama3=Llama3Scaling(32.0, 1.0, 4.0, 8192))
ROPES = [Rope(10_000.0), Rope(500_000.0, linear_factor=4.0), LLAMA3]


def rotated(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """`x` `[head_dim]` as complex numbers x[i] + i x[i + half], each turned by its angle; float64."""
    half = x.shape[0] // 2
    turned = torch.complex(x[:half].double(), x[half:].double()) * torch.polar(
        torch.ones(half, dtype=torch.float64), position * frequencies.double()
    )
    return torch.cat((turned.real, turned.imag))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("head_dim", [8, 80])
def test_rotations_turn_pairs_by_their_angle(rope: Rope, head_dim: int) -> None:
    positions = torch.tensor([0, 1, 63, 255, 256, 700])
    x = torch.randn(len(positions), 3, head_dim, generator=torch.Generator().manual_seed(0))
    ours = RopeTable(rope, head_dim).at(positions, torch.float32).apply(x)
    frequencies = inverse_frequencies(rope, head_dim)
    for row, position in enumerate(positions.tolist()):
        for head in range(3):
            torch.testing.assert_close(
                ours[row, head].double(), rotated(x[row, head], position, frequencies), rtol=0, atol=2e-4
            )


def test_llama3_scaling_divides_long_waves_and_keeps_short_ones() -> None:
    """By the definition: kept below original/high positions a turn, divided above original/low, a ramp between."""
    plain, scaled = inverse_frequencies(Rope(500_000.0), 128).double(), inverse_frequencies(LLAMA3, 128).double()
    wavelengths = 2 * torch.pi / plain
    ramp = (8192 / wavelengths - 1.0) / 3.0
    expected = torch.where(
        wavelengths > 8192, plain / 32, torch.where(wavelengths < 2048, plain, (1 - ramp) * plain / 32 + ramp * plain)
    )
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)
    assert bool(((ramp > 0) & (ramp < 1)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_of_a_position_depend_on_nothing_else(dtype: torch.dtype, threads: int) -> None:
    """Tables grown in one go, step by step, and by other numbers of threads."""
    rng = random.Random(0)
    everything = torch.arange(3000)
    expected = RopeTable(ROPES[0], 256).at(everything, dtype)
    torch.set_num_threads(threads)
    for _ in range(2):
        table = RopeTable(ROPES[0], 256)
        for position in sorted(rng.sample(range(3000), 4)):
            table.at(torch.tensor([position]), dtype)
        order = torch.tensor(rng.sample(range(3000), 500))
        ours = table.at(order, dtype)
        assert torch.equal(ours.cos, expected.cos[order])
        assert torch.equal(ours.sin, expected.sin[order])
