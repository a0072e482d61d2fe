"""The operators in plain PyTorch: slow, obvious, and what every other implementation is tested against.

`attention.py` says why a row's bits do not depend on its neighbours.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvist.ops import coding, packing
from kvist.ops.attention import Rows, sum_by_halves
from kvist.ops.packing import Geometry
from kvist.ops.schema import LIBRARIES, REFERENCE

NAMESPACE = REFERENCE


def write(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, H, D] at `slots` [T]; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    geometry = packing.geometry(keys, values)
    rows = (slots.shape[0] if slots.dim() == 1 else -1, geometry.heads, geometry.head_dim)
    if slots.dtype is not torch.int64 or tuple(k.shape) != rows or tuple(v.shape) != rows:
        raise ValueError(
            f"write needs k and v [T, {geometry.heads}, {geometry.head_dim}] and slots [T] int64, "
            f"got {list(k.shape)}, {list(v.shape)} and {list(slots.shape)} {slots.dtype}"
        )
    if k.dtype not in packing.DTYPES or v.dtype != k.dtype:
        raise ValueError(f"write takes k and v of one floating dtype, got {k.dtype} and {v.dtype}")
    limit = geometry.blocks * geometry.block_size
    if bool(((slots < -1) | (slots >= limit)).any()):
        raise IndexError(f"slots must be -1 (padding) or in [0, {limit}), got {slots.min()} to {slots.max()}")
    real = slots >= 0
    packing.scatter_keys(keys, slots[real], k[real])
    packing.scatter_values(values, slots[real], v[real])


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention over paged keys and values; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    return attend_own(q, keys, values, tables, starts, lengths, scale, window, softcap)[0].to(q.dtype)


def attend_own(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attend` in float32 [T, Hq, D], and each row's lse [T, Hq]; see `kvist.ops.schema`."""
    geometry = packing.geometry(keys, values)
    check_attend(geometry, geometry.head_dim, q, tables, starts, lengths, scale, window, softcap)
    out = torch.zeros(q.shape)
    lse = torch.full(q.shape[:2], -torch.inf)
    for sequence, rows, length in sequences(starts, lengths):

        def load(start: int, count: int, table: Tensor = tables[sequence]) -> tuple[Tensor, Tensor]:
            blocks = table[start // geometry.block_size :].clamp(min=0)  # what is not there is not seen
            return packing.gather_keys(keys, blocks, count), packing.gather_values(values, blocks, count)

        rounded = geometry.dtype is torch.bfloat16
        attention = Rows(geometry.heads, length, scale, load, rounded=rounded, window=window, softcap=softcap)
        out[rows], lse[rows] = attention.attend(q[rows].float())
    return out, lse


def seal(
    open: Tensor,
    planes: list[Tensor],
    flat: list[int],
    frame: list[Tensor],
    keys: bool,
    sources: Tensor,
    targets: Tensor,
) -> None:
    """Codes whole blocks of one stream; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    block_size, heads, dim = check_stream(planes, flat, frame, keys)
    gather = packing.gather_keys if keys else packing.gather_values
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        if not 0 <= source < len(open) or not 0 <= target < len(planes[0]):
            raise IndexError(f"block {source} of {len(open)} cannot be sealed into block {target} of {len(planes[0])}")
        x = gather(open, torch.tensor([source]), block_size)
        if x.shape[1:] != (heads, dim):
            raise ValueError(f"the open plane holds {list(x.shape[1:])} a token, the coded one {[heads, dim]}")
        if not flat:
            scatter = packing.scatter_keys if keys else packing.scatter_values
            scatter(planes[0], target * block_size + torch.arange(block_size), x)
            continue
        how, where = coding.parse(flat, frame[3]), coding.Frame(*frame[:3])
        codes, scales = coding.encode(x, how, where)
        planes[0][target] = coding.pack_block(codes, how, keys)
        planes[1][target] = scales.permute(1, 2, 0)


def attend_coded(
    q: Tensor,
    own: Tensor,
    lse: Tensor,
    key_planes: list[Tensor],
    key_coding: list[int],
    key_frame: list[Tensor],
    value_planes: list[Tensor],
    value_coding: list[int],
    value_frame: list[Tensor],
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention over coded blocks, merged with `own`; see `kvist.ops.schema`. Raises `ValueError` or `IndexError`."""
    size, heads, dim = check_stream(key_planes, key_coding, key_frame, keys=True)
    if (block_size, heads, dim) != check_stream(value_planes, value_coding, value_frame, keys=False):
        raise ValueError("the key planes and the value planes hold different blocks, heads or dims")
    geometry = Geometry(min(len(key_planes[0]), len(value_planes[0])), heads, size, dim, torch.float32)
    check_attend(geometry, geometry.head_dim, q, tables, starts, lengths, scale, window, softcap)
    if own.shape != q.shape or lse.shape != q.shape[:2] or own.dtype != torch.float32 or lse.dtype != torch.float32:
        raise ValueError(f"own and lse are float32 {list(q.shape)} and {list(q.shape[:2])}")
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for sequence, rows, length in sequences(starts, lengths):

        def load(start: int, count: int, table: Tensor = tables[sequence]) -> tuple[Tensor, Tensor]:
            blocks = table[start // block_size :].clamp(min=0)  # what is not there is not seen
            return (
                decode_blocks(key_planes, key_coding, key_frame, True, blocks, count),
                decode_blocks(value_planes, value_coding, value_frame, False, blocks, count),
            )

        centre = key_frame[0] if key_coding else torch.zeros(heads, dim)
        attention = Rows(heads, length, scale, load, own_block=block_size, window=window, softcap=softcap)
        out[rows] = merge(q[rows].float(), *attention.attend(q[rows].float()), own[rows], lse[rows], centre, scale)
    return out


def merge(q: Tensor, out: Tensor, sum: Tensor, own: Tensor, own_sum: Tensor, centre: Tensor, scale: float) -> Tensor:
    """Attention over two sets of keys together, from the results [n, Hq, D] and binary log sums [n, Hq] of each.

    The keys behind `out` have lost their mean `centre` [H, D].
    """
    lost = q.unflatten(1, (len(centre), -1)) * centre[:, None]
    sum = sum + sum_by_halves(lost).flatten(1) * (scale * math.log2(math.e))
    top = torch.maximum(sum, own_sum)
    # `torch.exp2` has other bits in the tail of its vector loop; `torch.exp` has not.
    share, own_share = (torch.exp((x - top) * math.log(2))[..., None] for x in (sum, own_sum))
    return (out * share + own * own_share) / (share + own_share)


def decode_blocks(
    planes: Sequence[Tensor], flat: Sequence[int], frame: Sequence[Tensor], keys: bool, blocks: Tensor, count: int
) -> Tensor:
    """The first `count` tokens of the blocks [n] of one stream, [count, H, D] float32; coded keys less their mean."""
    if not flat:
        return (packing.gather_keys if keys else packing.gather_values)(planes[0], blocks, count)
    how = coding.parse(list(flat), frame[3])
    size, heads = planes[1].shape[3], planes[1].shape[1]
    ids = blocks[: -(-count // size)].long()
    codes = coding.unpack_block(planes[0][ids].flatten(0, 1), how, keys, size)  # [B, n * H, D]
    codes = codes.unflatten(1, (-1, heads)).transpose(0, 1).flatten(0, 1)[:count]
    scales = planes[1][ids].permute(0, 3, 1, 2).flatten(0, 1)[:count]
    return coding.decode(codes, scales, how, coding.Frame(frame[0], frame[1], frame[2]))


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2I] → silu(gate) * up [..., I], in float32, rounded once.

    Composed from `torch.exp` and exact operations: `F.silu` has other bits in the tail of its vector loop.
    """
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or gate_up.dtype not in packing.DTYPES:
        raise ValueError(f"silu_mul takes a floating [..., 2I] tensor, got {list(gate_up.shape)} {gate_up.dtype}")
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """x Φ(x), in float32, rounded once; `tanh` takes the tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    if x.dtype not in packing.DTYPES:
        raise ValueError(f"gelu takes a floating tensor, got {x.dtype}")
    wide = x.float()
    if tanh:  # 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
        u = 0.7978845608028654 * (wide + 0.044715 * (wide * wide * wide))
        return (wide / (1 + torch.exp(-2 * u))).to(x.dtype)
    return (0.5 * wide * (1 + torch.erf(wide * 0.7071067811865476))).to(x.dtype)


def sequences(starts: Tensor, lengths: Tensor) -> Iterator[tuple[int, slice, int]]:
    """Number, rows and length of each sequence that has rows."""
    bounds = starts.tolist()
    for sequence, length in enumerate(lengths.tolist()):
        if bounds[sequence] < bounds[sequence + 1]:
            yield sequence, slice(bounds[sequence], bounds[sequence + 1]), length


def check_stream(
    planes: Sequence[Tensor], flat: Sequence[int], frame: Sequence[Tensor], keys: bool
) -> tuple[int, int, int]:
    """Block size, heads and dim of a stream's planes. Raises `ValueError` unless all belong together."""
    if not flat:
        if len(planes) != 1 or frame:
            raise ValueError("a stream that is not coded has one plane and no frame")
        return packing.plane_geometry(planes[0], keys)
    if len(planes) != 2 or len(frame) != 4:
        raise ValueError(
            f"a coded stream has two planes and four tensors of its frame, got {len(planes)}, {len(frame)}"
        )
    how, (codes, scales) = coding.parse(list(flat), frame[3]), planes
    if scales.dim() != 4 or scales.dtype is not torch.float16 or scales.shape[2] != len(how.segments):
        raise ValueError(f"scales are [blocks, H, {len(how.segments)}, B] float16, got {list(scales.shape)}")
    blocks, heads, _, size = scales.shape
    if reason := coding.unsupported_coding(how.dim, size):
        raise ValueError(reason)
    if codes.dtype is not torch.uint8 or tuple(codes.shape) != (blocks, heads, how.code_bytes(size)):
        raise ValueError(f"codes are {[blocks, heads, how.code_bytes(size)]} uint8, got {list(codes.shape)}")
    if [list(x.shape) for x in frame[:3]] != [[heads, how.dim], [heads, how.dim], [how.dim]]:
        raise ValueError(f"the frame of {heads} heads of {how.dim} has other shapes: {[list(x.shape) for x in frame]}")
    return size, heads, how.dim


def check_attend(
    geometry: Geometry,
    key_dim: int,
    q: Tensor,
    tables: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """Raises `ValueError` or `IndexError` unless queries of `key_dim` numbers and all that goes with them are sound."""
    if q.dim() != 3 or q.shape[2] != key_dim or not q.shape[1] or q.shape[1] % geometry.heads:
        raise ValueError(f"attend needs q [T, a multiple of {geometry.heads}, {key_dim}], got {list(q.shape)}")
    if q.dtype not in packing.DTYPES:
        raise ValueError(f"attend takes q as float32, bfloat16 or float16, got {q.dtype}")
    sequences = lengths.shape[0] if lengths.dim() == 1 else -1
    if tables.dim() != 2 or tables.shape[0] != sequences or tuple(starts.shape) != (sequences + 1,):
        raise ValueError(
            f"attend needs tables [S, max_blocks], starts [S + 1] and lengths [S], "
            f"got {list(tables.shape)}, {list(starts.shape)} and {list(lengths.shape)}"
        )
    if any(x.dtype is not torch.int32 for x in (tables, starts, lengths)):
        raise ValueError(f"tables, starts and lengths are int32, got {tables.dtype}, {starts.dtype}, {lengths.dtype}")
    if window < 0:
        raise ValueError(f"a window is not negative, got {window}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"softcap must be finite and not negative, got {softcap}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    counts = starts.diff()
    if int(starts[0]) != 0 or bool((counts < 0).any()) or int(starts[-1]) > q.shape[0]:
        raise ValueError(f"starts must rise from 0 to at most the {q.shape[0]} rows of q, got {starts.tolist()}")
    if bool((lengths < counts).any()) or bool((lengths > tables.shape[1] * geometry.block_size).any()):
        raise ValueError(
            f"lengths must cover each sequence's queries and fit its {tables.shape[1]} blocks of "
            f"{geometry.block_size}, got {lengths.tolist()}"
        )
    needed = (lengths[:, None] + geometry.block_size - 1) // geometry.block_size
    block = torch.arange(tables.shape[1], device=tables.device)
    oldest = (lengths - counts + 1 - window).clamp(min=0) * (counts > 0) if window else torch.zeros_like(lengths)
    used = tables[(block < needed) & (block >= (oldest // geometry.block_size)[:, None])]
    if bool(((used < 0) | (used >= geometry.blocks)).any()):
        raise IndexError(f"block ids must be in [0, {geometry.blocks}), got {used.min()} to {used.max()}")


LIBRARIES[REFERENCE].impl("write", write, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("attend", attend, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("attend_own", attend_own, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("seal", seal, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("attend_coded", attend_coded, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("silu_mul", silu_mul, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("gelu", gelu, "CompositeExplicitAutograd")
LIBRARIES[REFERENCE].impl("instruction_set", lambda: "PyTorch", "CompositeExplicitAutograd")
