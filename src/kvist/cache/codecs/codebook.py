"""Centroids for a coordinate of a uniformly random unit vector, and whole-number levels near them for kernels.

In d dimensions the coordinate's density is proportional to (1 - x^2)^((d - 3) / 2). Everything here is in units of
its standard deviation, y = sqrt(d) * x, where the law tends to the standard normal as d grows. With x = sin(t) the
density becomes cos(t)^(d - 2), analytic to its very ends, so that Gauss-Legendre quadrature is exact to rounding.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvist.ops.coding import UNIT, Segment

Floats = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_REACH = 10.0  # deviations; what lies beyond weighs 1e-22
_SCALES = 4096  # tried when levels are rounded


@dataclass(frozen=True)
class Codebook:
    """`centroids`: 2^bits ascending, times sqrt(d). `distortion`: mean squared error of a unit vector coded with them,
    which is also that of one coordinate in units of its variance."""

    centroids: tuple[float, ...]
    distortion: float


@dataclass(frozen=True)
class Levels:
    """A codebook as whole numbers: centroid = level / per_deviation, nearly. `distortion` as that of a codebook."""

    levels: tuple[int, ...]
    per_deviation: float
    distortion: float


@cache
def codebook(dim: int, bits: int) -> Codebook:
    """The Lloyd-Max quantizer (Lloyd 1982; Max 1960) of 1 to 4 bits for vectors of `dim` >= 2 numbers.

    The density is logarithmically concave from three dimensions on, so the stationary point is the one optimum. A few
    of Lloyd's own steps come near it, Newton's then double the digits each time.
    """
    if not 1 <= bits <= 4 or dim < 2:
        raise ValueError(f"codebooks have 1 to 4 bits in at least 2 dimensions, got {bits} bits in {dim}")
    count = 2 ** (bits - 1)
    half = (np.arange(count) + 0.5) * min(3.0, 0.9 * dim**0.5) / count
    for _ in range(20):
        mass, first, _ = _moments(_edges(half, dim), dim)
        half = first / mass
    for _ in range(12):
        step = _newton_step(half, dim)
        half = half + step
        if np.abs(step).max() < 1e-15:
            break
    mass, first, second = 2 * _moments(_edges(half, dim), dim)
    distortion = float((second - 2 * half * first + half * half * mass).sum())
    return Codebook((*(-half[::-1]).tolist(), *half.tolist()), distortion)


@cache
def whole_levels(dim: int, bits: int) -> Levels:
    """The codebook's centroids in the whole numbers of magnitude below 128 that lose least.

    Near the optimum a centroid moved by e costs its cell's probability times e^2, so the scale is chosen by that; the
    distortion is then computed for the levels themselves, with the borders in the middle between them.
    """
    half = np.array(codebook(dim, bits).centroids[2 ** (bits - 1) :])
    mass = _moments(_edges(half, dim), dim)[0]
    scales = np.linspace(0.5, 1.0, _SCALES) * (UNIT - 0.5 - 1e-9) / half[-1]
    moved = np.round(half * scales[:, None]) / scales[:, None] - half
    scale = float(scales[(mass * moved**2).sum(1).argmin()])
    levels = np.round(half * scale)
    rounded = levels / scale
    mass, first, second = 2 * _moments(_edges(rounded, dim), dim)
    distortion = float((second - 2 * rounded * first + rounded**2 * mass).sum())
    whole = [int(level) for level in levels]
    return Levels((*(-level for level in reversed(whole)), *whole), scale, distortion)


@cache
def segment(dims: int, bits: int) -> Segment:
    """`dims` rotated channels under one scale, each the nearest of the levels for their number."""
    chosen = whole_levels(dims, bits)
    return Segment(dims, bits, chosen.levels, chosen.per_deviation)


def _edges(half: Floats, dim: int) -> Floats:
    """The borders of the cells of the positive centroids: 0, the middles between neighbours, the end of the law."""
    return np.concatenate(([0.0], (half[1:] + half[:-1]) / 2, [min(_REACH, dim**0.5)]))


def _moments(edges: Floats, dim: int) -> Floats:
    """[3, cells]: the integrals of 1, y and y^2 over each cell under the law."""
    angles = np.arcsin(edges / dim**0.5)
    centre, radius = (angles[1:] + angles[:-1]) / 2, (angles[1:] - angles[:-1]) / 2
    sine = np.sin(centre[:, None] + radius[:, None] * _NODES)
    weight = radius[:, None] * _WEIGHTS * _power_of_cosine(sine, dim - 2) * _normalizer(dim)
    y = dim**0.5 * sine
    return np.stack([weight.sum(1), (weight * y).sum(1), (weight * y * y).sum(1)])


@cache
def _normalizer(dim: int) -> float:
    """What makes the law's integral one."""
    most = float(np.arcsin(min(1.0, _REACH / dim**0.5)))
    weight = _WEIGHTS * _power_of_cosine(np.sin(most / 2 * (1 + _NODES)), dim - 2)
    return float(1 / (most * weight.sum()))


def _power_of_cosine(sine: Floats, power: float) -> Floats:
    return np.exp(power / 2 * np.log1p(-sine * sine))


def _newton_step(half: Floats, dim: int) -> Floats:
    """Toward the centroids that are the means of their own cells. A border at t moves a mean g by f(t) |t - g| / mass
    for each unit, and half as much for each unit of either centroid beside it."""
    edges = _edges(half, dim)
    mass, first, _ = _moments(edges, dim)
    mean = first / mass
    inner = edges[1:-1]
    density = _normalizer(dim) * _power_of_cosine(inner / dim**0.5, dim - 3) / dim**0.5
    below, above = density * (inner - mean[:-1]) / mass[:-1] / 2, density * (mean[1:] - inner) / mass[1:] / 2
    pull = np.append(below, 0) + np.insert(above, 0, 0)
    jacobian = np.diag(pull - 1) + np.diag(below, 1) + np.diag(above, -1)
    return np.linalg.solve(jacobian, half - mean)
