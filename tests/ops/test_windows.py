"""Attention over windows: what is seen, and that nothing else matters."""

import pytest
import torch
from coded import coded
from paged import BACKENDS, COMPILED, Piece, backend, int32, paged, random_queries, random_sequence
from torch import Tensor

LENGTH, HEADS, GROUP, DIM = 1210, 2, 3, 32
WINDOWS = (1, 5, 16, 63, 64, 65, 130, 512, 700, LENGTH, 5000)
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plainly(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """In float64, all queries of a sequence at once."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(GROUP, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    first = k.shape[1] - q.shape[1]
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(first).triu(first + 1 - window)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def attend(ops, cache, piece: Piece, window: int, tables: Tensor | None = None) -> Tensor:
    tables = cache.tables if tables is None else tables
    where = tables, int32([0, len(piece.q)]), int32([piece.length])
    return ops.attend(piece.q, cache.keys, cache.values, *where, cache.scale, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_seen(name, dtype):
    ops = backend(name)
    k, v = random_sequence(LENGTH, HEADS, DIM, 1)
    q = random_queries(LENGTH, HEADS * GROUP, DIM, 2)
    cache = paged(ops, [(k, v)], dtype)
    k, v = k.to(dtype), v.to(dtype)
    for window in WINDOWS if name == "cpu" else (5, 65, 700):
        found = attend(ops, cache, Piece(0, q[-40:], LENGTH), window)
        expected = plainly(q[-40:], k, v, window, cache.scale)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=DTYPES[dtype])
    assert torch.equal(attend(ops, cache, Piece(0, q, LENGTH), LENGTH), attend(ops, cache, Piece(0, q, LENGTH), 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_else_matters(name, dtype):
    """Not the chunks, nor the threads, nor what stands in blocks before the window, nor whether there are any."""
    ops, threads = backend(name), torch.get_num_threads()
    k, v = random_sequence(LENGTH, HEADS, DIM, 1)
    q = random_queries(LENGTH, HEADS * GROUP, DIM, 2)
    cache = paged(ops, [(k, v)], dtype)
    for window in (1, 20, 65, 300, 600):
        whole = attend(ops, cache, Piece(0, q, LENGTH), window)
        assert whole.isfinite().all()
        try:
            for first, last in ((0, 1), (63, 65), (511, 530), (700, 701), (1000, LENGTH), (LENGTH - 1, LENGTH)):
                torch.set_num_threads(1 + first % 2)
                gone = cache.tables.clone()
                gone[0, : max(0, first + 1 - window) // 64] = -1
                part = attend(ops, cache, Piece(0, q[first:last], last), window, gone)
                assert torch.equal(part, whole[first:last]), (window, first)
        finally:
            torch.set_num_threads(threads)
    if name != "reference":
        with pytest.raises(IndexError):
            attend(ops, cache, Piece(0, q[-5:], LENGTH), 200, torch.full_like(cache.tables, -1))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_touches_only_the_rows_that_see_it(name, dtype):
    ops = backend(name)
    k, v = random_sequence(LENGTH, HEADS, DIM, 1)
    q = random_queries(LENGTH, HEADS * GROUP, DIM, 2)
    for window in (1, 5, 64, 65, 300):
        piece = Piece(0, q, LENGTH)
        expected = attend(ops, paged(ops, [(k, v)], dtype), piece, window)
        for position in (700, 701):
            broken_k, broken_v = k.clone(), v.clone()
            broken_k[position] = torch.nan
            broken_v[position] = torch.inf
            seeing = torch.zeros(LENGTH, dtype=torch.bool)
            seeing[position : position + window] = True
            for sequence in ((broken_k, v), (k, broken_v)):
                result = attend(ops, paged(ops, [sequence], dtype), piece, window)
                assert torch.equal(result[~seeing], expected[~seeing]), (window, position)
                assert not result[seeing].isfinite().any()


@pytest.mark.parametrize("window", [30, 64, 65, 129])
@pytest.mark.parametrize("name", COMPILED)
def test_a_scale_that_is_not_a_number_touches_only_the_rows_that_see_it(name, window):
    ops = backend(name)
    cache = coded(ops, [random_sequence(700, HEADS, DIM, 3)], ("turbo4", "turbo4"))
    piece = Piece(0, random_queries(700, HEADS * GROUP, DIM, 4), 700)
    expected, position = windowed(ops, cache, piece, window), 300
    scales = cache.values.planes[1]  # [blocks, heads, segments, tokens]
    scales[int(cache.tables[0, position // 64]), :, :, position % 64] = torch.inf
    result = windowed(ops, cache, piece, window)
    seeing = torch.zeros(700, dtype=torch.bool)
    seeing[320 : max(320, position + window)] = True  # behind the position's own block
    assert torch.equal(result[~seeing], expected[~seeing])
    assert not result[seeing].isfinite().any()


@pytest.mark.parametrize("kv", ["turbo4", "int8", "turbo2.5"])
@pytest.mark.parametrize("name", BACKENDS)
def test_coded_blocks(name, kv):
    """Windows that end within a block, at its ends, and within the query's own."""
    ops = backend(name)
    k, v = random_sequence(700, HEADS, DIM, 3)
    q = random_queries(700, HEADS * GROUP, DIM, 4)
    cache = coded(ops, [(k, v)], (kv, kv))
    everything = cache.attend(ops, [Piece(0, q, 700)])
    assert torch.equal(windowed(ops, cache, Piece(0, q, 700), 700), everything)
    for window in (1, 30, 64, 65, 129, 300, 600) if name != "reference" else (30, 129):
        whole = windowed(ops, cache, Piece(0, q, 700), window)
        expected = plainly(q, k, v, window, cache.scale)
        error = float((whole.double() - expected).norm() / expected.norm())
        assert error < {"turbo4": 0.12, "int8": 0.02, "turbo2.5": 0.5}[kv], window
        for first, last in ((0, 3), (63, 66), (128, 129), (300, 390), (699, 700)):
            part = windowed(ops, cache, Piece(0, q[first:last], last), window, first // 64 * 64 - window)
            assert torch.equal(part, whole[first:last]), (window, first)


def windowed(ops, cache, piece: Piece, window: int, gone: int = 0) -> Tensor:
    """`Coded.attend` with a window; blocks wholly before token `gone` are not there."""
    starts, blocks, lengths, size = [0], [], [], cache.block_size
    first = piece.length - len(piece.q)
    for index in range(first // size, (piece.length - 1) // size + 1):
        end = min(piece.length, (index + 1) * size)
        starts.append(starts[-1] + end - max(first, index * size))
        blocks.append(int(cache.tables[0, index]))
        lengths.append(end - index * size)
    own_where = int32(blocks)[:, None], int32(starts), int32(lengths)
    own = ops.attend_own(piece.q, cache.keys.open, cache.values.open, *own_where, cache.scale, window)
    tables = cache.tables[:1].clone()
    tables[0, : max(0, gone) // size] = -1
    where = tables, int32([0, len(piece.q)]), int32([piece.length])
    operands = *cache.keys.operands, *cache.values.operands
    return ops.attend_coded(piece.q, *own, *operands, *where, size, cache.scale, window)
