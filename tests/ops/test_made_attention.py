"""Attention whose keys are made of the values: against float64 written out plainly, and against itself, however it is
called."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from coded import CodedStream
from paged import BACKENDS, COMPILED, Piece, backend, int32, random_queries
from torch import Tensor

from kvist.cache.codecs import codec
from kvist.cache.spec import Role, Stream
from kvist.ops import packing
from kvist.ops.backend import Backend
from kvist.ops.coding import Frame

LENGTHS, QUERIES = (700, 3, 576, 70), (9, 3, 1, 33)
BEHIND = 32  # numbers of a vector behind the values
# value dim, KV heads, query heads per KV head, block size
SHAPES = [(32, 2, 1, 64), (48, 1, 16, 16), (80, 3, 3, 32), (512, 1, 5, 64)]
DENSE = ["fp32", "bf16", "fp16"]
KINDS = [
    *((name, name) for name in (*DENSE, "turbo4", "int8")),
    ("turbo3", "bf16"),
    ("fp32", "turbo2"),
    ("int4", "turbo2.5"),
]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=["-".join(dict.fromkeys(kind)) for kind in KINDS])
both_ways = pytest.mark.parametrize("tied", [False, True], ids=["behind", "tied"])


@dataclass(frozen=True)
class Made:
    """Sequences of values, with what stands behind them or what keys are made with."""

    values: CodedStream
    behind: CodedStream
    weight: Tensor
    angles: Tensor  # [positions / 16, pairs, 16]
    tied: bool
    tables: Tensor
    block_size: int
    scale: float = 0.1
    window: int = 0

    @property
    def lossy(self) -> bool:
        return not all(stream.codec.in_place for stream in self._streams())

    def attend(self, ops: Backend, pieces: Sequence[Piece], padding: int = 0) -> Tensor:
        q = torch.cat([piece.q for piece in pieces])
        q = torch.cat([q, torch.full((padding, *q.shape[1:]), torch.nan, dtype=q.dtype)])
        tables = torch.stack([self.tables[piece.sequence] for piece in pieces])
        where = tables, int32([0, *accumulate(len(piece.q) for piece in pieces)]), int32([p.length for p in pieces])
        own = self._own(ops, q, pieces) if self.lossy else []
        offsets = torch.zeros(len(pieces), dtype=torch.int32)
        found = self._call(ops, q, own, [stream.operands for stream in self._streams()], offsets, *where)
        assert found[1].shape == q.shape[:2]
        return found[0]

    def _own(self, ops: Backend, q: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
        starts, blocks, lengths, offsets, size = [0], [], [], [], self.block_size
        for piece in pieces:
            first = piece.length - len(piece.q)
            for index in range(first // size, (piece.length - 1) // size + 1):
                end = min(piece.length, (index + 1) * size)
                starts.append(starts[-1] + end - max(first, index * size))
                blocks.append(int(self.tables[piece.sequence, index]))
                lengths.append(end - index * size)
                offsets.append(index * size)
        where = int32(blocks)[:, None], int32(starts), int32(lengths)
        open = [([stream.open], [], []) for stream in self._streams()]
        return list(self._call(ops, q, [], open, int32(offsets), *where))

    def _call(self, ops: Backend, q, own, streams, offsets, tables, starts, lengths):
        tie = [self.weight, self.angles.cos(), self.angles.sin(), offsets] if self.tied else []
        behind = ([], [], []) if self.tied else streams[1]
        where = tables, starts, lengths, self.block_size
        return ops.attend_made(q, own, *behind, *streams[0], tie, *where, self.scale, self.window)

    def _streams(self) -> list[CodedStream]:
        return [self.values] if self.tied else [self.values, self.behind]

    def plainly(self, piece: Piece, exact: bool = False) -> Tensor:
        """Attention of a piece in float64, row by row: [n, Hq, D]; `exact`: as if nothing were coded."""
        blocks, size, rows = (
            self.tables[piece.sequence, : -(-piece.length // self.block_size)].long(),
            self.block_size,
            [],
        )
        known = [_vectors(stream, blocks, piece.length) for stream in self._streams()]
        for q, position in zip(piece.q.double(), range(piece.length - len(piece.q), piece.length), strict=True):
            border = 0 if exact or not self.lossy else position // size * size
            v, *behind = (torch.cat([there[:border], own[border : position + 1]]) for own, there in known)
            k = self._tied(v) if self.tied else torch.cat([v, behind[0]], dim=-1)
            scores = torch.einsum("hgd,thd->hgt", q.unflatten(0, (k.shape[1], -1)), k) * self.scale
            if self.window:
                scores[..., : max(0, position + 1 - self.window)] = -torch.inf
            rows.append(torch.einsum("hgt,thd->hgd", torch.softmax(scores, -1), v).flatten(0, 1))
        return torch.stack(rows)

    def _tied(self, v: Tensor) -> Tensor:
        angles = self.angles.transpose(1, 2).flatten(0, 1)[: len(v)].double()  # [n, pairs]
        k, pairs, half = v * self.weight.double(), angles.shape[1], v.shape[2] // 2
        turned = (
            torch.complex(k[..., :pairs], k[..., half : half + pairs])
            * torch.polar(torch.ones(()).double(), angles)[:, None]
        )
        k[..., :pairs], k[..., half : half + pairs] = turned.real, turned.imag
        return k


def _vectors(stream: CodedStream, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """As they were written [n, H, D] float64, and as their whole blocks decode."""
    gather = packing.gather_keys if stream.stream.role is Role.KEYS else packing.gather_values
    own = gather(stream.open, blocks, length).double()
    whole = [stream.decoded(int(block)).double() for block in blocks[: (length - 1) // stream_block_size(stream)]]
    return own, torch.cat([*whole, own[:0]])


def stream_block_size(stream: CodedStream) -> int:
    return packing.plane_geometry(stream.open, stream.stream.role is Role.KEYS)[0]


def made(ops: Backend, kind: tuple[str, str], shape: tuple[int, int, int, int], tied: bool, seed: int = 0) -> Made:
    """Writes sequences to open blocks in an order that `seed` shuffles, and codes the full ones."""
    dim, heads, _, size = shape
    needed = [-(-length // size) for length in LENGTHS]
    blocks, random = sum(needed) + 3, torch.Generator().manual_seed(seed)
    tables = torch.full((len(LENGTHS), max(needed)), -1, dtype=torch.int32)
    order = torch.randperm(blocks, generator=random).int()
    for row, (first, count) in enumerate(zip(accumulate([0, *needed]), needed, strict=False)):
        tables[row, :count] = order[first : first + count]
    streams = [
        _stream(ops, kind[1], Role.VALUES, heads, dim, size, tables),
        _stream(ops, kind[0], Role.KEYS, heads, BEHIND, size, tables),
    ]
    pairs = dim // 2 if dim < 80 else dim // 4
    angles = torch.outer(torch.arange(704.0), torch.arange(1, pairs + 1) / pairs).unflatten(0, (-1, 16)).mT.contiguous()
    weight = 1 + torch.randn(dim, generator=torch.Generator().manual_seed(3)) / 4
    return Made(*streams, weight, angles, tied, tables, size)


def _stream(ops, name: str, role: Role, heads: int, dim: int, size: int, tables: Tensor) -> CodedStream:
    chosen, stream, blocks = codec(name), Stream(role.value, role, heads, dim), int(tables.max()) + 4
    keys = role is Role.KEYS
    shape_of = packing.key_plane_shape if keys else packing.value_plane_shape
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    open = torch.full(shape_of(blocks, heads, size, dim, dtype), torch.nan, dtype=dtype)
    mean = torch.randn(heads, dim, generator=torch.Generator().manual_seed(9)) * keys
    frame = Frame.plain(heads, dim)
    if chosen.ordered:
        turned = torch.stack([torch.randperm(dim, generator=torch.Generator().manual_seed(h)) for h in range(heads)])
        frame = replace(frame, order=turned.int())
    frame = replace(frame, mean=mean if chosen.centred and keys else frame.mean)
    planes = [
        torch.full((blocks, *plane.shape), torch.nan if plane.dtype.is_floating_point else 0x5A, dtype=plane.dtype)
        for plane in chosen.planes(stream, size)
    ]
    made = CodedStream(chosen, stream, frame, planes, open)
    for row, length in enumerate(LENGTHS):
        x = torch.randn(length, heads, dim, generator=torch.Generator().manual_seed(20 * row + keys)) + mean
        token = torch.arange(length)
        slots = tables[row].long()[token // size] * size + token % size
        (packing.scatter_keys if keys else packing.scatter_values)(open, slots, x.to(dtype))
        whole = tables[row, : length // size].tolist()
        if chosen.in_place:
            planes[0][whole] = open[whole]
            planes[0][tables[row, len(whole) : -(-length // size)].long()] = open[
                tables[row, len(whole) : -(-length // size)].long()
            ]
        else:
            made.seal(ops, whole)
    return made


def pieces_of(shape, tied: bool) -> list[Piece]:
    dim, heads, group, _ = shape
    wide = dim + (0 if tied else BEHIND)
    both = enumerate(zip(QUERIES, LENGTHS, strict=True))
    return [Piece(i, random_queries(count, heads * group, wide, 10 + i), length) for i, (count, length) in both]


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_ways
@each_kind
def test_the_kernels_own_error_is_small(kind, shape, tied):
    """A tenth of the codecs' where values are coded, since weights become whole numbers; that of their type else."""
    ops = backend("cpu")
    cache, pieces = made(ops, kind, shape, tied), pieces_of(shape, tied)
    found = cache.attend(ops, pieces, padding=2)
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    assert not found[len(through) :].any()
    own = distance(found[: len(through)], through)
    if cache.values.codec.in_place:
        assert own <= {"fp32": 1e-6, "fp16": 1e-6, "bf16": 4e-3}[kind[1]] * float(through.norm())
    else:
        exact = torch.cat([cache.plainly(piece, exact=True) for piece in pieces])
        assert 0 < own <= distance(through, exact) / 10


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@both_ways
@each_kind
def test_the_reference_makes_and_attends(kind, shape, tied):
    ops = backend("reference")
    cache, pieces = made(ops, kind, shape, tied), pieces_of(shape, tied)
    found = cache.attend(ops, pieces, padding=2)
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    assert distance(found[: len(through)], through) < 2e-6 * float(through.norm())


@both_ways
@each_kind
def test_all_instruction_sets_compute_the_same(kind, tied):
    cache, pieces = made(backend("cpu"), kind, SHAPES[2], tied), pieces_of(SHAPES[2], tied)
    results = [cache.attend(backend(name), pieces) for name in COMPILED]
    for other in results[1:]:
        assert distance(results[0], other) < (1e-3 if "bf16" in kind else 1e-5) * float(results[0].norm())


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", BACKENDS)
@both_ways
@pytest.mark.parametrize("kind", [("fp32", "fp32"), ("bf16", "bf16"), ("turbo4", "turbo4")], ids=str)
def test_a_row_has_the_same_bits_alone_in_a_chunk_and_beside_others(kind, tied, name, window):
    if name == "reference" and (window or kind[0] == "bf16"):
        pytest.skip("the same in the reference, and slow")
    ops, shape = backend(name), (64, 2, 3, 64)
    cache = replace(made(ops, kind, shape, tied), window=window)
    q = random_queries(700, 6, 64 if tied else 64 + BEHIND, 1)
    whole = cache.attend(ops, [Piece(0, q, 700)])
    if name != "reference":
        sample = Piece(0, q[680:], 700)
        close = 0.02 if "turbo4" in kind else 4e-3
        assert distance(whole[680:], cache.plainly(sample)) < close * float(whole[680:].norm())
    for start, end in ((0, 1), (63, 66), (511, 514), (300, 420), (699, 700)):
        part = Piece(0, q[start:end], end)
        other = Piece(3, random_queries(5, 6, q.shape[2], 2), 70)
        assert torch.equal(cache.attend(ops, [part]), whole[start:end])
        assert torch.equal(cache.attend(ops, [other, part], padding=3)[5:-3], whole[start:end])
    elsewhere = replace(made(ops, kind, shape, tied, seed=5), window=window)
    assert not torch.equal(elsewhere.tables, cache.tables)
    assert torch.equal(elsewhere.attend(ops, [Piece(0, q[500:], 700)]), whole[500:])
    if name == "cpu":
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(cache.attend(ops, [Piece(0, q, 700)]), whole)


@both_ways
def test_half_precision_queries(tied):
    ops = backend("cpu")
    cache, pieces = made(ops, ("turbo4", "turbo4"), SHAPES[1], tied), pieces_of(SHAPES[1], tied)
    narrow = [replace(piece, q=piece.q.bfloat16()) for piece in pieces]
    wide = [replace(piece, q=piece.q.float()) for piece in narrow]
    assert torch.equal(cache.attend(ops, narrow), cache.attend(ops, wide))


@both_ways
def test_a_wrong_weight_or_another_stream_behind_shows(tied):
    """The comparison notices keys that are made in another way."""
    ops = backend("cpu")
    cache, pieces = made(ops, ("fp32", "fp32"), SHAPES[0], tied), pieces_of(SHAPES[0], tied)
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    if tied:
        other = replace(cache, angles=cache.angles.flip(1).contiguous())
    else:
        other = replace(cache, behind=replace(cache.behind, planes=[cache.behind.planes[0] + 1.5]))
        other.behind.planes[0][:, 1] *= 2
    assert distance(other.attend(ops, pieces), through) > 1e-3 * float(through.norm())


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(name):
    ops = backend(name)
    tied, behind = (made(ops, ("fp32", "fp32"), SHAPES[0], tied) for tied in (True, False))
    (piece, *_), (wide, *_) = pieces_of(SHAPES[0], True), pieces_of(SHAPES[0], False)
    with pytest.raises(ValueError, match="q"):
        tied.attend(ops, [wide])
    with pytest.raises(ValueError, match="q"):
        behind.attend(ops, [piece])
    with pytest.raises(ValueError, match="positions"):
        replace(tied, angles=tied.angles[:20]).attend(ops, [piece])
    with pytest.raises(ValueError, match="weight"):
        replace(tied, weight=tied.weight[:-1]).attend(ops, [piece])
    with pytest.raises(ValueError, match="pairs"):
        replace(tied, angles=tied.angles.repeat(1, 2, 1)).attend(ops, [piece])
    with pytest.raises(ValueError, match="block"):
        replace(behind, block_size=32).attend(ops, [wide])
    gone = behind.tables.clone()
    gone[0, 3] = 999
    with pytest.raises(IndexError):
        replace(behind, tables=gone).attend(ops, [wide])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", [("bf16", "bf16"), ("turbo4", "int8")], ids=str)
@both_ways
def test_the_operator_satisfies_pytorch(tied, kind, name):
    """Schema, fake tensors, no aliases."""
    cache, (piece, *_) = made(backend(name), kind, SHAPES[0], tied), pieces_of(SHAPES[0], tied)
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return backend(name).attend_made(*arguments)

    cache.attend(replace(backend(name), attend_made=record), [piece])
    assert len(calls) == 1 + cache.lossy
    for arguments in calls:
        assert set(torch.library.opcheck(backend(name).attend_made, arguments).values()) == {"SUCCESS"}
