"""Attention over coded blocks: against float64 written out plainly, and against itself, however it is called."""

from itertools import pairwise

import pytest
import torch
from coded import Coded, coded
from paged import COMPILED, Piece, backend, random_queries, random_sequence
from torch import Tensor

from kvist.cache.codecs import CODECS
from kvist.cache.codecs.base import Codec

NAMES = [name for name, c in CODECS.items() if not c.in_place and not name.startswith("paper")]
MIXED = [("bf16", "turbo4"), ("turbo3", "fp16"), ("fp32", "int8"), ("int8", "turbo2"), ("turbo2.5", "int4")]
KINDS = [(name, name) for name in NAMES] + MIXED
# dim, KV heads, query heads per KV head, block size
SHAPES = [(32, 2, 1, 64), (48, 1, 4, 16), (64, 3, 3, 64), (80, 1, 19, 32), (128, 2, 4, 64), (512, 1, 7, 64)]
LENGTHS = (700, 3, 576, 70)
QUERIES = (9, 3, 1, 33)

each_kind = pytest.mark.parametrize("kind", KINDS, ids=["-".join(dict.fromkeys(kind)) for kind in KINDS])


def sequences(dim: int, heads: int, lengths=LENGTHS, spread: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    """Keys about a mean of their own; with a larger `spread` softmaxes have a peak."""
    mean = 2 * torch.randn(heads, dim, generator=torch.Generator().manual_seed(9))
    made = [random_sequence(length, heads, dim, seed) for seed, length in enumerate(lengths)]
    return [(spread * k + mean, v) for k, v in made]


def ragged(ops, kind, shape, spread: float = 1.0) -> tuple[Coded, list[Piece]]:
    dim, heads, group, block_size = shape
    pieces = [
        Piece(i, random_queries(count, heads * group, dim, 10 + i), length)
        for i, (count, length) in enumerate(zip(QUERIES, LENGTHS, strict=True))
    ]
    return coded(ops, sequences(dim, heads, spread=spread), kind, block_size), pieces


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm())


@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
def test_the_kernels_own_error_is_a_tenth_of_the_codecs(kind, shape, spread):
    ops = backend("cpu")
    cache, pieces = ragged(ops, kind, shape, spread)
    found = cache.attend(ops, pieces, padding=2)
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    exact = torch.cat([cache.plainly(piece, exact=True) for piece in pieces])
    assert not found[len(through) :].any()
    own, codecs = distance(found[: len(through)], through), distance(through, exact)
    assert 0 < own <= codecs / 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
def test_the_reference_decodes_and_attends(kind, shape):
    ops = backend("reference")
    cache, pieces = ragged(ops, kind, shape)
    found = cache.attend(ops, pieces, padding=2)
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    assert distance(found[: len(through)], through) < 2e-6 * float(through.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
def test_all_instruction_sets_compute_the_same(kind, shape):
    """The whole numbers are equal, so results differ by the rounding of a few float operations."""
    cache, pieces = ragged(backend("cpu"), kind, shape)
    results = [cache.attend(backend(name), pieces) for name in COMPILED]
    dense = any(CODECS[name].in_place for name in kind)
    for one, other in pairwise(results):
        assert distance(one, other) < (1e-3 if dense else 1e-5) * float(one.norm())


@pytest.mark.parametrize("name", ["reference", *COMPILED])
@each_kind
def test_a_row_has_the_same_bits_alone_in_a_chunk_and_beside_others(kind, name):
    if name == "reference" and kind not in (("turbo4", "turbo4"), ("bf16", "turbo4")):
        pytest.skip("decoding is the same for all, and slow")
    ops, dim, heads, group = backend(name), 64, 2, 3
    made = sequences(dim, heads, (600, 130))
    cache = coded(ops, made, kind)
    q = random_queries(600, heads * group, dim, 1)
    whole = cache.attend(ops, [Piece(0, q, 600)])
    for start, end in ((0, 1), (63, 66), (511, 514), (300, 420), (599, 600)):
        part = Piece(0, q[start:end], end)
        other = Piece(1, random_queries(5, heads * group, dim, 2), 130)
        assert torch.equal(cache.attend(ops, [part]), whole[start:end])
        assert torch.equal(cache.attend(ops, [other, part], padding=3)[5:-3], whole[start:end])
    elsewhere = coded(ops, made, kind, seed=5)
    assert not torch.equal(elsewhere.tables, cache.tables)
    if not any(CODECS[n].ordered for n in kind):  # whose order the seed shuffles too
        assert torch.equal(elsewhere.attend(ops, [Piece(0, q[400:], 600)]), whole[400:])


@each_kind
def test_threads_change_no_bit(kind):
    ops = backend("cpu")
    cache, pieces = ragged(ops, kind, (64, 3, 3, 64))
    long = [Piece(0, random_queries(300, 9, 64, 3), 700), *pieces[1:]]
    alone = [cache.attend(ops, work) for work in (pieces, long)]
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(torch.equal(cache.attend(ops, work), one) for work, one in zip((pieces, long), alone, strict=True))


@pytest.mark.parametrize("name", COMPILED)
@each_kind
def test_what_a_row_does_not_see_has_no_influence(kind, name):
    """Blocks that are not yet full may hold anything, scales that are no numbers among it: they did in all tests. Here
    blocks behind the query change between two calls."""
    ops = backend(name)
    cache = coded(ops, sequences(64, 2, (700,)), kind)
    piece = Piece(0, random_queries(4, 6, 64, 1), 200)
    before = cache.attend(ops, [piece])
    for block in cache.tables[0, 3:].tolist():
        for plane in (*cache.keys.planes, *cache.values.planes):
            plane[block] = torch.nan if plane.dtype.is_floating_point else 0xFF
    assert torch.equal(cache.attend(ops, [piece]), before)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_scale_that_is_no_number_shows(side, name):
    ops = backend(name)
    cache = coded(ops, sequences(64, 2, (300,)), ("turbo4", "turbo4"))
    block = int(cache.tables[0, 1])
    getattr(cache, side).planes[1][block, 0, 0, 5] = torch.inf
    found = cache.attend(ops, [Piece(0, random_queries(200, 6, 64, 1), 300)])
    behind = found[128 - 100 :]
    assert not torch.isfinite(behind[:, :3]).all(-1).any()
    assert torch.isfinite(behind[:, 3:]).all(), "the other head has its own scales"
    assert torch.isfinite(found[: 128 - 100]).all()


def test_rows_of_the_first_block_get_what_they_have():
    ops = backend("cpu")
    cache = coded(ops, sequences(64, 2, (64,)), ("turbo2", "turbo2"))
    piece = Piece(0, random_queries(64, 6, 64, 1), 64)
    assert distance(cache.attend(ops, [piece]), cache.plainly(piece, exact=True)) < 1e-4


def test_the_comparison_notices_a_codec_that_is_not_the_one():
    """Values of another codec's levels: far more than a tenth of the codec's error."""
    ops = backend("cpu")
    cache, pieces = ragged(ops, ("turbo4", "turbo4"), (64, 3, 3, 64))
    through = torch.cat([cache.plainly(piece) for piece in pieces])
    exact = torch.cat([cache.plainly(piece, exact=True) for piece in pieces])
    other: Codec = CODECS["int4-rot"]
    levels = other.coding(cache.values.stream).segments[0].levels
    planes, flat, frame = cache.values.operands
    damaged = flat.copy()
    damaged[-16:] = levels
    tables = torch.stack([cache.tables[piece.sequence] for piece in pieces])
    q = torch.cat([piece.q for piece in pieces])
    starts = torch.tensor([0, 9, 12, 13, 46], dtype=torch.int32)
    own, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    found = ops.attend_coded(
        q,
        own,
        lse,
        *cache.keys.operands,
        planes,
        damaged,
        frame,
        tables,
        starts,
        torch.tensor(LENGTHS, dtype=torch.int32),
        64,
        cache.scale,
    )
    assert distance(found, through) > distance(through, exact) / 10
