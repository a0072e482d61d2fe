"""The algorithms of arXiv 2504.19874 as printed give the figures that the paper prints."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvist.cache.codecs import codec
from kvist.cache.codecs.codebook import codebook
from kvist.cache.codecs.paper import PaperCodec, gaussian_projection, haar_rotation, pack_bits, unpack_bits
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Frame

DIM = 128
STREAM = Stream("k", Role.KEYS, 1, DIM)


def unit(count: int, seed: int) -> Tensor:
    x = torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def round_trip(of: PaperCodec, x: Tensor) -> Tensor:
    frame = Frame.plain(1, DIM)
    return of.decode(of.encode(x[:, None], STREAM, frame), STREAM, frame)[:, 0]


# The paper's figures, of section 1.3 and of theorems 1 and 2, where it cuts them off with the digits cut.
@pytest.mark.parametrize(("bits", "printed"), [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_mean_squared_error(bits: int, printed: float) -> None:
    x = unit(4096, 1)
    found = float(((round_trip(PaperCodec("mse", bits, residual=False), x) - x) ** 2).sum(-1).mean())
    assert found == pytest.approx(printed, rel=0.03)
    assert found == pytest.approx(codebook(DIM, bits).distortion, rel=0.01)


@pytest.mark.parametrize(("bits", "printed"), [(1, 1.57), (2, 0.56), (3, 0.18), (4, 0.0543)])
def test_error_of_inner_products(bits: int, printed: float) -> None:
    """Times d. For 4 bits the paper prints .047, which its own theorem contradicts: pi / 2 times D_mse of 3 bits."""
    x, y = unit(4096, 1), unit(4096, 2)
    error = (round_trip(PaperCodec("prod", bits - 1, residual=True), x) - x) @ y.T
    found = DIM * float((error**2).mean())
    assert found == pytest.approx(printed, rel=0.03)
    assert found == pytest.approx(math.pi / 2 * (codebook(DIM, bits - 1).distortion if bits > 1 else 1), rel=0.02)


def test_the_first_algorithm_shrinks_and_the_second_does_not() -> None:
    x = unit(4096, 1)
    shrunk = float((round_trip(PaperCodec("mse", 2, residual=False), x) * x).sum(-1).mean())
    assert shrunk == pytest.approx(1 - codebook(DIM, 2).distortion, abs=0.002)
    straight = float((round_trip(PaperCodec("prod", 1, residual=True), x) * x).sum(-1).mean())
    assert straight == pytest.approx(1, abs=0.005)


def test_the_rotation_is_orthogonal_and_signed() -> None:
    rotation = haar_rotation(DIM).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(DIM, dtype=torch.float64), atol=1e-5)
    gaussian = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert bool(((rotation.T @ gaussian).diagonal() > 0).all())  # R's diagonal
    projection = gaussian_projection(DIM)
    assert float(projection.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((projection * rotation).mean())) < 0.02


@pytest.mark.parametrize("name", ["paper-mse2", "paper-prod3"])
def test_names_count_all_bits_but_the_norms(name: str) -> None:
    planes = {plane.name: plane for plane in codec(name).planes(STREAM, 64)}
    in_codes = sum(plane.nbytes for key, plane in planes.items() if key in ("k.codes", "k.signs"))
    assert 8 * in_codes / (64 * DIM) == int(name[-1])
    assert planes["k.norms"].shape == (1, 64)


def test_packing_is_least_significant_bits_first() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 0, 0, 0, 0, 0]), 3).tolist() == [0b11_010_001, 0, 0]


@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_packing_comes_back(bits: int, eighths: int, random) -> None:
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(8 * eighths)] for _ in range(3)])
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, eighths * bits)
    assert torch.equal(unpack_bits(packed, bits, 8 * eighths), codes)
