"""Vectors as codes of a few bits: the description, the layout of its planes, and both directions in plain PyTorch.

A vector is first put in a frame: its mean is subtracted, its channels are put in an order, and it is rotated by blocks
of a randomized Hadamard matrix (signs, then butterflies, then 1/sqrt(n)). Each of these may be the identity. Then it
is cut into segments. A segment has one scale per token, and each of its numbers is a code that names one of the
segment's levels: number = scale * level / 128. Levels are whole numbers from -127 to 127, so that kernels multiply
bytes; the rounding of a codebook to them is part of the codec, not an error of a kernel.

| plane  | shape                                 | holds                                                  |
|--------|---------------------------------------|--------------------------------------------------------|
| codes  | [blocks, H, B * sum(dims * bits) / 8] | columns, see below                                     |
| scales | [blocks, H, segments, B] float16      | one per token and segment                              |

Codes lie in columns: 16 lanes by `steps` steps of four codes, the operands of an instruction that multiplies four
bytes by four and adds them up. Keys: a column is 16 tokens of one segment, a step is four dims; a block is its tiles of
16 tokens, each tile its segments. Values: a column is 16 dims, a step is four tokens; a block is its segments, each
its groups of 16 dims. A column of `steps` steps (a multiple of four), each of 64 codes (lane * 4 + number):

    8 bits   step after step, a byte (two's complement) a code, which is the level itself
    4 bits   64 bytes hold steps 2i (low half of each byte) and 2i + 1
    2 bits   64 bytes hold steps 4i to 4i + 3, lowest bits first
    3 bits   the two low bits as above, then the high bits of step after step, 8 bytes each, code 0 in the lowest bit

H: KV heads, B: block size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property

import torch
from torch import Tensor

from kvist.ops.packing import LANES

UNIT = 128  # a level of 128 stands for the scale itself
MAX_LEVELS = 16
BITS = (2, 3, 4, 8)
MIN_CODED_DIM, MAX_CODED_DIM = 32, 512
MAX_CODED_BLOCK = 64


TRIED = (1.22, 1.16, 1.1, 1.05, 1.0, 0.96, 0.92, 0.88, 0.84)
"""Levels per deviation that are tried for each vector, relative to those that are best on average. The largest of 64
numbers differs from vector to vector, and a vector whose largest is small is better off with levels closer together:
at 4 bits this takes a fifth off the squared error."""


class Rule(IntEnum):
    """How a segment is scaled. x: the numbers, l: their levels."""

    ABSMAX = 0  # the largest magnitude takes level 127
    SIGNED_MAX = 1  # the number of largest magnitude takes the lowest level, as in ggml's q4_0
    UNBIASED = 2  # levels near to x are searched (TRIED); scale = |x|^2 / <x, l>, so that <x, decoded x> = |x|^2
    LEAST_SQUARES = 3  # searched likewise; scale = <x, l> / |l|^2, the nearest to x that these levels allow


@dataclass(frozen=True)
class Segment:
    """`dims` channels under one scale, `bits` bits each. `levels`: 2^bits ascending, none for 8 bits.

    `per_deviation`: levels that stand for one standard deviation, for the rules that code relative to the norm.
    """

    dims: int
    bits: int
    levels: tuple[int, ...] = ()
    per_deviation: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.dims < 16 or self.dims % 16:
            raise ValueError(f"a segment has a multiple of 16 channels in 2, 3, 4 or 8 bits, got {self}")
        if len(self.levels) != (0 if self.bits == 8 else 2**self.bits):
            raise ValueError(f"{self.bits}-bit codes name {2**self.bits} levels, got {len(self.levels)}")
        if list(self.levels) != sorted(set(self.levels)) or any(abs(level) >= UNIT for level in self.levels):
            raise ValueError(f"levels ascend from at least -127 to at most 127, got {self.levels}")


@dataclass(frozen=True)
class Coding:
    """How the vectors of one stream are coded. `rotation`: sizes of the Hadamard blocks, powers of two; none: as is."""

    segments: tuple[Segment, ...]
    rule: Rule
    rotation: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rotation and sum(self.rotation) != self.dim:
            raise ValueError(f"the rotation covers {sum(self.rotation)} of {self.dim} channels")
        if any(size & (size - 1) or size < 1 for size in self.rotation):
            raise ValueError(f"a Hadamard block has a power of two of channels, got {self.rotation}")

    @property
    def dim(self) -> int:
        return sum(segment.dims for segment in self.segments)

    def code_bytes(self, block_size: int) -> int:
        """Bytes of the codes of one block and head."""
        return block_size * sum(segment.dims * segment.bits for segment in self.segments) // 8

    def flat(self) -> list[int]:
        """As operators take it: rule, rotation (count, sizes), segments (count, then dims, bits and levels of each)."""
        numbers = [int(self.rule), len(self.rotation), *self.rotation, len(self.segments)]
        for segment in self.segments:
            numbers += [segment.dims, segment.bits, *segment.levels]
        return numbers

    @cached_property
    def per_deviation(self) -> Tensor:
        """[segments] float32."""
        return torch.tensor([segment.per_deviation for segment in self.segments])


def parse(flat: Sequence[int], per_deviation: Tensor) -> Coding:
    """The inverse of `Coding.flat`. Raises `ValueError` for numbers that are no coding."""
    numbers = iter(flat)
    try:
        rule = Rule(next(numbers))
        rotation = tuple(next(numbers) for _ in range(next(numbers)))
        segments = []
        for index in range(next(numbers)):
            dims, bits = next(numbers), next(numbers)
            count = 2**bits if bits in (2, 3, 4) else 0
            levels = tuple(next(numbers) for _ in range(count))
            segments.append(Segment(dims, bits, levels, float(per_deviation[index])))
    except (StopIteration, RuntimeError, IndexError):
        raise ValueError(f"not a coding: {list(flat)}") from None
    return Coding(tuple(segments), rule, rotation)


@dataclass(frozen=True)
class Frame:
    """Where the heads of one layer's stream are put before they are coded.

    `mean` [H, D] float32 is subtracted; then channel i is channel `order[:, i]` ([H, D] int32); then, where the coding
    rotates, `signs` [D] float32 are multiplied and the Hadamard blocks applied.
    """

    mean: Tensor
    order: Tensor
    signs: Tensor

    @staticmethod
    def plain(heads: int, dim: int) -> "Frame":
        """No mean, channels in their own order."""
        return Frame(torch.zeros(heads, dim), torch.arange(dim, dtype=torch.int32).repeat(heads, 1), signs(dim))

    def tensors(self, coding: Coding) -> list[Tensor]:
        """As operators take it: mean, order, signs, and the coding's levels per deviation."""
        return [self.mean, self.order, self.signs, coding.per_deviation]


def unsupported_coding(dim: int, block_size: int) -> str | None:
    """Why vectors of this size are not coded, or None when they are."""
    if dim % 16 or not MIN_CODED_DIM <= dim <= MAX_CODED_DIM:
        return f"coded heads have a multiple of 16 channels from {MIN_CODED_DIM} to {MAX_CODED_DIM}, not {dim}"
    if block_size % LANES or not LANES <= block_size <= MAX_CODED_BLOCK or MAX_CODED_BLOCK % block_size:
        return f"a coded block holds 16, 32 or 64 tokens, not {block_size}"
    return None


@cache
def signs(dim: int) -> Tensor:
    """[dim] float32 of +1 and -1, the same everywhere and always: part of the format."""
    state, drawn = 0x9E3779B97F4A7C15, []
    for _ in range(dim):  # xorshift64* (Vigna 2016), so that no library's generator is part of the format
        state ^= state >> 12
        state = (state ^ (state << 25)) & (2**64 - 1)
        state ^= state >> 27
        drawn.append(1.0 if (state * 0x2545F4914F6CDD1D) >> 63 & 1 else -1.0)
    return torch.tensor(drawn)


def rotation_blocks(dim: int) -> tuple[int, ...]:
    """`dim` as a sum of powers of two, the largest first: the Hadamard blocks of a segment."""
    return tuple(1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1)


def hadamard(x: Tensor, blocks: Sequence[int]) -> Tensor:
    """x [..., D] float32 times the symmetric orthogonal Hadamard matrix of each block, by butterflies."""
    parts = []
    for part, size in zip(x.split(list(blocks), dim=-1), blocks, strict=True):
        half = 1
        while half < size:
            pairs = part.unflatten(-1, (-1, 2, half))
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            part = torch.stack((low + high, low - high), dim=-2).flatten(-3)
            half *= 2
        parts.append(part * size**-0.5)
    return torch.cat(parts, dim=-1)


def into_frame(x: Tensor, coding: Coding, frame: Frame, centre: bool) -> Tensor:
    """x [..., H, D] → float32 in the frame; queries are not centred."""
    x = x.float() - frame.mean if centre else x.float()
    x = x.gather(-1, frame.order.long().expand(x.shape))
    return hadamard(x * frame.signs, coding.rotation) if coding.rotation else x


def out_of_frame(y: Tensor, coding: Coding, frame: Frame) -> Tensor:
    """The inverse of `into_frame` but for the mean, which is never added back."""
    if coding.rotation:
        y = hadamard(y, coding.rotation) * frame.signs
    return torch.zeros_like(y).scatter(-1, frame.order.long().expand(y.shape), y)


def quantize(y: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """y [..., D] float32 in the frame → codes [..., D] int16 and scales [..., segments] float16."""
    codes, scales = [], []
    for part, segment in zip(y.split([s.dims for s in coding.segments], dim=-1), coding.segments, strict=True):
        code, scale = _quantize_segment(part, segment, coding.rule)
        codes.append(code)
        scales.append(scale)
    return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1).half()


def dequantize(codes: Tensor, scales: Tensor, coding: Coding) -> Tensor:
    """The inverse of `quantize`: [..., D] float32 in the frame."""
    parts = []
    for index, (code, segment) in enumerate(
        zip(codes.split([s.dims for s in coding.segments], dim=-1), coding.segments, strict=True)
    ):
        parts.append(_levels(code, segment) * (scales[..., index : index + 1].float() / UNIT))
    return torch.cat(parts, dim=-1)


def encode(x: Tensor, coding: Coding, frame: Frame) -> tuple[Tensor, Tensor]:
    """x [..., H, D] → codes [..., H, D] int16 and scales [..., H, segments] float16."""
    return quantize(into_frame(x, coding, frame, centre=True), coding)


def decode(codes: Tensor, scales: Tensor, coding: Coding, frame: Frame) -> Tensor:
    """[..., H, D] float32: what `encode` was given, less the mean, nearly."""
    return out_of_frame(dequantize(codes, scales, coding), coding, frame)


def pack_block(codes: Tensor, coding: Coding, keys: bool) -> Tensor:
    """codes [B, H, D] int16 of one block → [H, code_bytes] uint8."""
    sizes = [segment.dims for segment in coding.segments]
    columns = [
        _pack(_columns(part, keys), segment.bits)
        for part, segment in zip(codes.split(sizes, dim=-1), coding.segments, strict=True)
    ]
    if keys:  # tile after tile, each with all its segments
        return torch.cat(columns, dim=2).flatten(1)
    return torch.cat([column.flatten(1) for column in columns], dim=1)


def unpack_block(packed: Tensor, coding: Coding, keys: bool, block_size: int) -> Tensor:
    """The inverse of `pack_block`: [H, code_bytes] uint8 → [B, H, D] int16."""
    heads, tiles, parts = len(packed), block_size // LANES, []
    columns = [tiles if keys else segment.dims // LANES for segment in coding.segments]
    sizes = [LANES * (s.dims if keys else block_size) * s.bits // 8 for s in coding.segments]  # of one column
    if keys:
        packed_parts = packed.unflatten(1, (tiles, -1)).split(sizes, dim=2)
    else:
        whole = [count * size for count, size in zip(columns, sizes, strict=True)]
        packed_parts = tuple(
            part.unflatten(1, (count, -1)) for part, count in zip(packed.split(whole, dim=1), columns, strict=True)
        )
    for part, segment in zip(packed_parts, coding.segments, strict=True):
        steps = _unpack(part, segment.bits).unflatten(-1, (LANES, 4))  # [H, columns, steps, 16, 4]
        by_token = steps.permute(1, 3, 0, 2, 4) if keys else steps.permute(2, 4, 0, 1, 3)
        parts.append(by_token.reshape(block_size, heads, segment.dims))
    return torch.cat(parts, dim=-1)


def _columns(codes: Tensor, keys: bool) -> Tensor:
    """codes [B, H, d] → [H, columns, steps, 64]."""
    size, heads, dims = codes.shape
    if keys:  # [tile, lane, H, step, number]
        columns = codes.reshape(size // LANES, LANES, heads, dims // 4, 4).permute(2, 0, 3, 1, 4)
    else:  # [step, number, H, group, lane]
        columns = codes.reshape(size // 4, 4, heads, dims // LANES, LANES).permute(2, 3, 0, 4, 1)
    return columns.flatten(-2)


def _pack(steps: Tensor, bits: int) -> Tensor:
    """Codes [H, columns, steps, 64] → [H, columns, bytes] uint8."""
    if bits == 3:
        high = _fold((steps >> 2).unflatten(-1, (8, 8)), 1)
        return torch.cat((_pack(steps & 3, 2), high.flatten(2).to(torch.uint8)), dim=2)
    if bits == 8:
        return (steps & 0xFF).to(torch.uint8).flatten(2)
    together = steps.unflatten(2, (-1, 8 // bits)).transpose(-1, -2)  # of several steps, one byte's codes last
    return _fold(together, bits).to(torch.uint8).flatten(2)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`: [H, columns, bytes] uint8 → [H, columns, steps, 64] int16."""
    if bits == 3:
        low, high = packed.split([packed.shape[2] * 2 // 3, packed.shape[2] // 3], dim=2)
        return _unpack(low, 2) | _unfold(high.unflatten(2, (-1, 8)), 1).flatten(-2) << 2
    if bits == 8:
        return packed.view(torch.int8).short().unflatten(2, (-1, 64))
    return _unfold(packed.unflatten(2, (-1, 64)), bits).transpose(-1, -2).flatten(2, 3)


def _fold(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., 8 / bits] → bytes [...], the first code lowest."""
    shifts = torch.arange(0, 8, bits, dtype=codes.dtype)
    return (codes << shifts).sum(-1)


def _unfold(packed: Tensor, bits: int) -> Tensor:
    """Bytes [...] → codes [..., 8 / bits] int16."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int16)
    return packed.short()[..., None] >> shifts & (1 << bits) - 1


def _levels(codes: Tensor, segment: Segment) -> Tensor:
    """The levels that codes name, float32."""
    return codes.float() if segment.bits == 8 else torch.tensor(segment.levels, dtype=torch.float32)[codes.long()]


def _quantize_segment(x: Tensor, segment: Segment, rule: Rule) -> tuple[Tensor, Tensor]:
    """x [..., dims] float32 → codes [..., dims] int16 and the scale [..., 1] float32. Zeros have the scale 0."""
    if rule is Rule.ABSMAX:
        reach, top = x.abs().amax(-1, keepdim=True), 127.0
    elif rule is Rule.SIGNED_MAX:
        reach, top = x.gather(-1, x.abs().argmax(-1, keepdim=True)), float(segment.levels[0])
    else:
        reach, top = (x * x).sum(-1, keepdim=True).sqrt(), segment.per_deviation * segment.dims**0.5
    per_level = torch.where(reach == 0, torch.zeros_like(reach), top / reach)
    if rule is Rule.ABSMAX or rule is Rule.SIGNED_MAX:
        return _nearest(x * per_level, segment), reach * (UNIT / top)
    if segment.bits < 8:
        per_level = _search(x, segment, per_level)
    codes = _nearest(x * per_level, segment)
    match, square = _fit(x, _levels(codes, segment))
    scale = reach * reach / match if rule is Rule.UNBIASED else match / square
    return codes, torch.where(reach == 0, torch.zeros_like(reach), scale * UNIT)


def _nearest(y: Tensor, segment: Segment) -> Tensor:
    """Codes int16 of numbers in units of a level. One at the middle of two levels takes the upper one."""
    if segment.bits == 8:
        return y.round().clamp(-127, 127).short()
    levels = torch.tensor(segment.levels, dtype=torch.float32)
    return torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, right=True).short()


def _search(x: Tensor, segment: Segment, per_level: Tensor) -> Tensor:
    """Levels per number [..., 1]: of `per_level` times TRIED, the first whose levels come nearest to x [..., dims]."""
    best, most = per_level, torch.zeros_like(per_level)
    for factor in TRIED:
        tried = per_level * factor
        match, square = _fit(x, _levels(_nearest(x * tried, segment), segment))
        captured = match * match / square
        better = captured > most
        best, most = torch.where(better, tried, best), torch.where(better, captured, most)
    return best


def _fit(x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """<x, l> and |l|^2, each [..., 1]."""
    return (x * level).sum(-1, keepdim=True), (level * level).sum(-1, keepdim=True)
