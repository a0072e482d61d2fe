"""The physical layout of the planes that hold keys and values, as shapes and views. Nothing here computes.

A plane is one tensor for one stream of one layer. It is cut into blocks of `block_size` tokens. Within a block the
bytes lie as the attention kernels stream them, once each and without shuffles:

| plane  | fp32, fp16                     | bf16                                                           |
|--------|--------------------------------|----------------------------------------------------------------|
| keys   | [blocks, H, B/16, D, 16]       | [blocks, H, B/16, D/2, 16, 2]: pairs of dims beside each other |
| values | [blocks, H, B, D]              | [blocks, H, B/2, D, 2]: pairs of tokens beside each other      |

16 tokens run along the vector lanes of keys, dims along those of values. The pairs are the operands of a bf16 dot
product, which multiplies two numbers at a time. H: KV heads, B: block size, D: head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16
SPLIT = 512
"""Attention cuts a sequence at multiples of this many tokens, so a block never crosses a cut."""
MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Geometry:
    """What a pair of planes holds: `blocks` blocks of `block_size` tokens of `heads` vectors of `head_dim` numbers."""

    blocks: int
    heads: int
    block_size: int
    head_dim: int
    dtype: torch.dtype


def unsupported(dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why planes of this kind do not exist, or None when they do."""
    if dtype not in DTYPES:
        return f"keys and values are stored as float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    if block_size % LANES or block_size < LANES or SPLIT % block_size:
        return f"block_size must be a multiple of {LANES} that divides {SPLIT}, got {block_size}"
    return None


def key_plane_shape(blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a key plane. Raises `ValueError` for a kind of plane that does not exist."""
    _require(dtype, head_dim, block_size)
    if dtype is torch.bfloat16:
        return (blocks, heads, block_size // LANES, head_dim // 2, LANES, 2)
    return (blocks, heads, block_size // LANES, head_dim, LANES)


def value_plane_shape(blocks: int, heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of a value plane. Raises `ValueError` for a kind of plane that does not exist."""
    _require(dtype, head_dim, block_size)
    if dtype is torch.bfloat16:
        return (blocks, heads, block_size // 2, head_dim, 2)
    return (blocks, heads, block_size, head_dim)


def geometry(keys: Tensor, values: Tensor) -> Geometry:
    """Reads the geometry off a pair of planes. Raises `ValueError` unless they are contiguous and belong together."""
    paired = keys.dtype is torch.bfloat16
    if keys.dim() != (6 if paired else 5):
        raise ValueError(f"a {keys.dtype} key plane has {6 if paired else 5} dimensions, got {list(keys.shape)}")
    blocks, heads, tiles, dims = keys.shape[:4]
    found = Geometry(blocks, heads, tiles * LANES, dims * 2 if paired else dims, keys.dtype)
    sizes = (blocks, heads, found.block_size, found.head_dim, keys.dtype)
    if tuple(keys.shape) != key_plane_shape(*sizes):
        raise ValueError(f"the key plane has shape {list(keys.shape)}, expected {list(key_plane_shape(*sizes))}")
    if tuple(values.shape) != value_plane_shape(*sizes):
        raise ValueError(f"the value plane has shape {list(values.shape)}, expected {list(value_plane_shape(*sizes))}")
    if values.dtype != keys.dtype:
        raise ValueError(f"the planes differ in dtype: keys {keys.dtype}, values {values.dtype}")
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError("planes must be contiguous")
    return found


def plane_geometry(plane: Tensor, keys: bool) -> tuple[int, int, int]:
    """Block size, heads and head dim of one plane. Raises `ValueError` when it is none."""
    paired = plane.dtype is torch.bfloat16
    if plane.dtype not in DTYPES or plane.dim() != 4 + keys + paired or not plane.is_contiguous():
        raise ValueError(f"not a contiguous plane of {'keys' if keys else 'values'}: {list(plane.shape)} {plane.dtype}")
    pack = 2 if paired else 1
    if keys:
        return plane.shape[2] * LANES, plane.shape[1], plane.shape[3] * pack
    return plane.shape[2] * pack, plane.shape[1], plane.shape[3]


def scatter_keys(plane: Tensor, slots: Tensor, x: Tensor) -> None:
    """Stores x [T, H, D] at slots [T] int64 (block * block_size + offset), rounded to the plane's dtype."""
    view = _keys_by_token(plane)
    tiles = view.shape[1]
    view[slots // (tiles * LANES), slots // LANES % tiles, slots % LANES] = _paired_dims(x.to(plane.dtype))


def scatter_values(plane: Tensor, slots: Tensor, x: Tensor) -> None:
    """Stores x [T, H, D] at slots [T] int64 (block * block_size + offset), rounded to the plane's dtype."""
    view = _values_by_token(plane)
    rows, pack = view.shape[1:3]
    view[slots // (rows * pack), slots // pack % rows, slots % pack] = x.to(plane.dtype)


def gather_keys(plane: Tensor, block_ids: Tensor, count: int) -> Tensor:
    """The first `count` tokens of the blocks [n] in order, as [count, H, D] float32. Reads no other token."""
    view = _keys_by_token(plane)
    tiles = view.shape[1]
    token = torch.arange(count, device=plane.device)
    block = block_ids[token // (tiles * LANES)].long()
    return view[block, token // LANES % tiles, token % LANES].flatten(2).float()


def gather_values(plane: Tensor, block_ids: Tensor, count: int) -> Tensor:
    """The first `count` tokens of the blocks [n] in order, as [count, H, D] float32. Reads no other token."""
    view = _values_by_token(plane)
    rows, pack = view.shape[1:3]
    token = torch.arange(count, device=plane.device)
    block = block_ids[token // (rows * pack)].long()
    return view[block, token // pack % rows, token % pack].float()


def _require(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    if reason := unsupported(dtype, head_dim, block_size):
        raise ValueError(reason)


def _keys_by_token(plane: Tensor) -> Tensor:
    """View [blocks, B/16, 16, H, D], or [blocks, B/16, 16, H, D/2, 2] of a bf16 plane."""
    return plane.permute(0, 2, 4, 1, 3, 5) if plane.dtype is torch.bfloat16 else plane.permute(0, 2, 4, 1, 3)


def _values_by_token(plane: Tensor) -> Tensor:
    """View [blocks, B/2, 2, H, D] of a bf16 plane, else [blocks, B, 1, H, D]."""
    paired = plane if plane.dtype is torch.bfloat16 else plane.unsqueeze(-1)
    return paired.permute(0, 2, 4, 1, 3)


def _paired_dims(x: Tensor) -> Tensor:
    """[T, H, D] as the key plane's last axes hold it."""
    return x.unflatten(-1, (-1, 2)) if x.dtype is torch.bfloat16 else x
