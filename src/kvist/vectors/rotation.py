"""A rotation for vectors of any size that spreads each number over all of them.

Two rounds of: random signs, then the Kronecker product of two symmetric orthogonal matrices whose sizes are the two
factors of the dimension nearest its root, Hadamard's where the factor is a power of two, Hartley's (Bracewell 1983:
cos + sin of 2 pi j k / n) where it is not. One round would leave what is uneven along a Hartley matrix uneven. The
blocks that rotate a head of the cache would not do here: of 200 numbers the last eight would keep their own share of
the energy; and nothing is padded, for padding is stored.
"""

import math

import torch
from torch import Tensor

from kvist.ops.coding import hadamard, signs


class Rotation:
    """Of vectors of `dim` numbers; the same for every `dim` everywhere but for rounding."""

    def __init__(self, dim: int) -> None:
        first = max(factor for factor in range(1, math.isqrt(dim) + 1) if dim % factor == 0)
        self._signs = signs(2 * dim).view(2, dim)
        self._first, self._second = _orthogonal(first), _orthogonal(dim // first)

    def into(self, x: Tensor) -> Tensor:
        """x [n, dim] float32 → rotated, [n, dim]."""
        for signs_of_round in self._signs:
            rows = (x * signs_of_round).unflatten(1, (len(self._first), -1))
            x = ((rows @ self._second).transpose(1, 2) @ self._first).flatten(1)
        return x

    def back(self, y: Tensor) -> Tensor:
        """The inverse of `into`."""
        for signs_of_round in self._signs.flip(0):
            columns = y.unflatten(1, (-1, len(self._first)))
            y = ((columns @ self._first).transpose(1, 2) @ self._second).flatten(1) * signs_of_round
        return y


def _orthogonal(size: int) -> Tensor:
    """[size, size] float32, symmetric and its own inverse."""
    if size & (size - 1) == 0:
        return hadamard(torch.eye(size), (size,))
    index = torch.arange(size)
    angles = (index[:, None] * index % size).double() * (2 * math.pi / size)
    return ((angles.cos() + angles.sin()) / math.sqrt(size)).float()
