"""The pieces that decoders are made of, and the context that they run in."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvist.models.config import Rope, Yarn


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Rotation:
    """`cos` and `sin` of one step's positions, `[T, 1, rotated]`, in the dtype of what is rotated."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the first dimensions of `x` `[T, heads, head_dim]`: i pairs with i + rotated / 2. The others stay."""
        rotated = self.cos.shape[-1]
        turned, rest = x[..., :rotated], x[..., rotated:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * self.cos + torch.cat((-second, first), dim=-1) * self.sin
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _yarn_frequencies(theta: float, yarn: Yarn, rotated: int) -> Tensor:
    def dimension(turns: float) -> float:
        return rotated * math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), rotated - 1)
    ramp = (torch.arange(rotated // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    ramp = ramp.clamp(0, 1)
    wavelengths = theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    return ramp / (yarn.factor * wavelengths) + (1 - ramp) / wavelengths


class RopeTable:
    """Rotations by position in float32, computed in chunks of fixed size so that a position's bits never depend on the
    rest. On the CPU even where it is made under another default device: it is no part of the weights.
    """

    CHUNK = 256  # positions

    def __init__(self, rope: Rope, rotated: int) -> None:
        with torch.device("cpu"):
            self._frequencies = inverse_frequencies(rope, rotated)
            self._scale = rope.scale if rope.yarn is None else rope.yarn.scale
            self._cos = torch.empty(0, 1, rotated)
            self._sin = torch.empty(0, 1, rotated)
            self._by_position = self._in_sixteens()

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of each of `positions` `[T]` int64, rounded once to `dtype`."""
        needed = int(positions.max()) + 1
        if self._cos.shape[0] < needed:
            self._grow(needed)
        return Rotation(self._cos[positions].to(dtype), self._sin[positions].to(dtype))

    def by_position(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[positions / 16, pairs, 16]` float32 of the pairs that turn, up to any position that was
        asked for."""
        return self._by_position

    def _grow(self, needed: int) -> None:
        cos, sin = [self._cos], [self._sin]
        for start in range(self._cos.shape[0], needed, self.CHUNK):
            angles = torch.outer(torch.arange(start, start + self.CHUNK, dtype=torch.float32), self._frequencies)
            angles = torch.cat((angles, angles), dim=-1)[:, None]
            cos.append(angles.cos() * self._scale)
            sin.append(angles.sin() * self._scale)
        self._cos, self._sin = torch.cat(cos), torch.cat(sin)
        self._by_position = self._in_sixteens()

    def _in_sixteens(self) -> tuple[Tensor, Tensor]:
        pairs = int((self._frequencies != 0).nonzero().max()) + 1
        cos, sin = (x[:, 0, :pairs].unflatten(0, (-1, 16)).mT.contiguous() for x in (self._cos, self._sin))
        return cos, sin


def inverse_frequencies(rope: Rope, rotated: int) -> Tensor:
    """`[rotated / 2]` float32 radians per token, scaling included."""
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    frequencies = 1.0 / (rope.theta**exponents) / rope.linear_factor
    if rope.divisors:
        return frequencies / torch.tensor(rope.divisors)
    if rope.yarn is not None:
        return _yarn_frequencies(rope.theta, rope.yarn, rotated)
    if rope.turning < 1:
        frequencies[int(rope.turning * rotated // 2) :] = 0
    if rope.llama3 is None:
        return frequencies
    scaling = rope.llama3
    wavelengths = 2 * math.pi / frequencies
    # 0 where the wavelength is long (divided by the factor), 1 where it is short (kept), a ramp between.
    ramp = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    ramp = ramp.clamp(0, 1)
    return frequencies / scaling.factor * (1 - ramp) + frequencies * ramp
