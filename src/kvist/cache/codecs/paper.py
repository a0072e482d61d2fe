"""TurboQuant exactly as printed (Zandieh et al. 2025, arXiv 2504.19874): for study, and for the paper's own figures.

Algorithm 1, `paper-mse`: u = x / |x| is rotated by a dense matrix drawn uniformly from all rotations, each coordinate
becomes its nearest centroid, the norm is kept in float16. Algorithm 2, `paper-prod`: one bit less for that, then the
signs of S r for the residual r = u - decoded u, with S of independent standard normal numbers, and |r|; decoding adds
sqrt(pi / 2) / d * |r| * S^T signs. The bits in a name are what a number gets in all, norms not counted.

Both matrices come from a fixed seed and are the same for every head; their bits may differ between libraries, so that
planes are for the machine that wrote them. No kernel reads these codecs.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Plane
from kvist.cache.codecs.codebook import codebook
from kvist.cache.spec import Stream
from kvist.ops.coding import Frame, unsupported_coding

SEED = 0


@dataclass(frozen=True)
class PaperCodec:
    """`bits` for the centroids, none at all for 0; `residual`: whether the second stage follows, one bit more."""

    name: str
    bits: int
    residual: bool
    in_place: bool = False
    centred: bool = False
    ordered: bool = False

    def planes(self, stream: Stream, block_size: int) -> tuple[Plane, ...]:
        if reason := unsupported_coding(stream.dim, block_size):
            raise ConfigError(f"{self.name} cannot hold the stream {stream.name!r}: {reason}")
        rows = (stream.heads, block_size)
        planes = (
            Plane(f"{stream.name}.codes", (*rows, stream.dim * self.bits // 8), torch.uint8),
            Plane(f"{stream.name}.norms", rows, torch.float16),
        )
        if not self.residual:
            return planes
        signs = Plane(f"{stream.name}.signs", (*rows, stream.dim // 8), torch.uint8)
        return (*planes, signs, Plane(f"{stream.name}.residuals", rows, torch.float16))

    def coding(self, stream: Stream) -> None:
        return None

    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        x = x.float().transpose(0, 1)  # [H, B, D]
        norms = x.norm(dim=-1)
        unit = x / norms.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        rotated = unit @ haar_rotation(stream.dim).T
        centroids = self._centroids(stream.dim)
        codes = torch.bucketize(rotated, (centroids[1:] + centroids[:-1]) / 2)
        planes = (pack_bits(codes, self.bits), norms.half())
        if not self.residual:
            return planes
        residual = unit - centroids[codes] @ haar_rotation(stream.dim)
        signs = residual @ gaussian_projection(stream.dim).T >= 0
        return (*planes, pack_bits(signs, 1), residual.norm(dim=-1).half())

    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        dim = stream.dim
        codes, norms = unpack_bits(planes[0], self.bits, dim), planes[1]
        unit = self._centroids(dim)[codes] @ haar_rotation(dim)
        if self.residual:
            signs = unpack_bits(planes[2], 1, dim).float() * 2 - 1
            unit += signs @ gaussian_projection(dim) * (planes[3].float()[..., None] * (math.sqrt(math.pi / 2) / dim))
        return (unit * norms.float()[..., None]).transpose(0, 1)

    def _centroids(self, dim: int) -> Tensor:
        """[2^bits] float32, ascending, of a unit vector's coordinates."""
        return torch.tensor(codebook(dim, self.bits).centroids if self.bits else (0.0,)) / math.sqrt(dim)


@cache
def haar_rotation(dim: int) -> Tensor:
    """[dim, dim] float32, orthogonal and uniformly distributed: QR of a Gaussian matrix, signed so that R's diagonal is
    positive (Mezzadri 2007, section 5); LAPACK's own signs would not be uniform."""
    gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    rotation: Tensor = q * r.diagonal().sign()
    return rotation.float()


@cache
def gaussian_projection(dim: int) -> Tensor:
    """[dim, dim] float32 of independent standard normal numbers."""
    return torch.randn(dim, dim, generator=torch.Generator().manual_seed(SEED + 1))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """codes [..., n] below 2^bits → [..., n * bits / 8] uint8, code after code, lowest bits first."""
    each = (codes[..., None].to(torch.uint8) >> torch.arange(bits, dtype=torch.uint8)) & 1
    return torch.from_numpy(np.packbits(each.flatten(-2).numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: [..., count] int64."""
    each = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, bitorder="little"))
    codes: Tensor = each.unflatten(-1, (count, bits)) @ (1 << torch.arange(bits, dtype=torch.uint8))
    return codes.long()


PAPER = (
    *(PaperCodec(f"paper-mse{bits}", bits, residual=False) for bits in (4, 3, 2)),
    *(PaperCodec(f"paper-prod{bits}", bits - 1, residual=True) for bits in (4, 3, 2)),
)
