"""Centroids against published ones, against sampled vectors and against their own definition."""

import math
import time

import numpy as np
import pytest

from kvist.cache.codecs.codebook import codebook, segment, whole_levels

# The positive halves for the standard normal law, as in Max 1960, table I, to which a coordinate's law tends.
NORMAL = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
NORMAL_DISTORTION = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}
ALL = [(dim, bits) for dim in (3, 16, 32, 48, 64, 96, 128, 256, 1536) for bits in (1, 2, 3, 4)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_many_dimensions_give_the_centroids_of_the_normal_law(bits: int) -> None:
    found = codebook(1_000_000, bits)
    assert found.centroids[2 ** (bits - 1) :] == pytest.approx(NORMAL[bits], abs=6e-5)
    assert found.distortion == pytest.approx(NORMAL_DISTORTION[bits], abs=6e-6)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1145), (3, 0.0334), (4, 0.0091)])
def test_exact_distortions_in_64_dimensions(bits: int, distortion: float) -> None:
    assert codebook(64, bits).distortion == pytest.approx(distortion, abs=5e-5)


@pytest.mark.parametrize(("bits", "printed", "digits"), [(1, 0.36, 2), (2, 0.117, 3), (3, 0.03, 2), (4, 0.009, 3)])
def test_the_papers_distortions_are_these_cut_off(bits: int, printed: float, digits: int) -> None:
    exact = codebook(1536, bits).distortion
    assert math.floor(exact * 10**digits) / 10**digits == printed


@pytest.mark.parametrize(("dim", "bits"), ALL)
def test_bounds_of_the_paper(dim: int, bits: int) -> None:
    """arXiv 2504.19874, theorems 1 and 3: between 4^-b and sqrt(3) pi / 2 times it; the lower in large d."""
    distortion = codebook(dim, bits).distortion
    assert distortion <= math.sqrt(3) * math.pi / 2 * 4**-bits
    if dim >= 16:
        assert distortion >= 4**-bits


@pytest.mark.parametrize(("dim", "bits"), ALL)
def test_each_centroid_is_the_mean_of_its_cell(dim: int, bits: int) -> None:
    """By another quadrature: the midpoint rule over the density itself, cell by cell."""
    centroids = np.array(codebook(dim, bits).centroids)
    reach = min(math.sqrt(dim), 10.0)
    edges = [-reach, *((centroids[1:] + centroids[:-1]) / 2), reach]
    total = error = 0.0
    for low, high, centroid in zip(edges, edges[1:], centroids, strict=False):
        y = low + (high - low) / 40_000 * (np.arange(40_000) + 0.5)
        density = np.exp((dim - 3) / 2 * np.log1p(-y * y / dim)) * (high - low)
        assert (density * y).sum() / density.sum() == pytest.approx(centroid, abs=1e-8)
        total, error = total + density.sum(), error + (density * (y - centroid) ** 2).sum()
    assert codebook(dim, bits).distortion == pytest.approx(error / total, rel=1e-7)


def test_centroids_are_symmetric_and_moving_them_costs() -> None:
    found = codebook(64, 3)
    assert list(found.centroids) == [-c for c in reversed(found.centroids)]
    generator = np.random.Generator(np.random.Philox(1))
    unit = generator.standard_normal((40_000, 64))
    y = unit / np.linalg.norm(unit, axis=1, keepdims=True) * 8

    def distortion(centroids: np.ndarray) -> float:
        return float(((y - centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, y)]) ** 2).mean())

    best = distortion(np.array(found.centroids))
    assert best == pytest.approx(found.distortion, rel=0.005)
    assert distortion(np.array(found.centroids) * 1.1) > best * 1.03


def test_a_circle_has_its_own_law() -> None:
    """In two dimensions the angle is uniform: the positive half circle has its mean at 2 / pi."""
    assert codebook(2, 1).centroids[1] == pytest.approx(math.sqrt(2) * 2 / math.pi, abs=1e-12)


@pytest.mark.parametrize(("dim", "bits"), [pair for pair in ALL if pair[0] >= 16])
def test_whole_levels_lose_next_to_nothing(dim: int, bits: int) -> None:
    chosen = whole_levels(dim, bits)
    assert len(chosen.levels) == 2**bits
    assert all(isinstance(level, int) for level in chosen.levels)
    assert max(map(abs, chosen.levels)) <= 127
    exact = codebook(dim, bits)
    assert exact.distortion * (1 - 1e-12) <= chosen.distortion <= exact.distortion * 1.005
    assert [level / chosen.per_deviation for level in chosen.levels] == pytest.approx(exact.centroids, abs=0.02)


def test_a_segment_carries_the_levels() -> None:
    found = segment(64, 4)
    assert (found.dims, found.bits) == (64, 4)
    assert (found.levels, found.per_deviation) == (whole_levels(64, 4).levels, whole_levels(64, 4).per_deviation)


def test_a_codebook_takes_milliseconds() -> None:
    seconds = []
    for dim in range(1000, 1011):
        start = time.perf_counter()
        codebook(dim, 4)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    assert codebook(1000, 4) is codebook(1000, 4)


@pytest.mark.parametrize(("dim", "bits"), [(64, 0), (64, 5), (1, 2)])
def test_no_codebook_of_that_kind(dim: int, bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 bits in at least 2 dimensions"):
        codebook(dim, bits)
