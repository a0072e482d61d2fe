"""A row's bits depend on what it sees and on nothing else. Every backend, every dtype, to the bit."""

from collections.abc import Iterator

import pytest
import torch
from paged import BACKENDS, Paged, Piece, backend, paged, random_queries, random_sequence
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, GROUP, DIM = 2, 3, 24
LENGTH = 1090
# The ends of pairs, lanes, tiles and splits, and their neighbours.
POSITIONS = [0, 1, 14, 15, 16, 17, 62, 63, 64, 65, 510, 511, 512, 513, 1023, 1024, 1025, LENGTH - 1]


@pytest.fixture(params=[(name, dtype) for name in BACKENDS for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request) -> tuple:
    name, dtype = request.param
    return backend(name), dtype


@pytest.fixture
def sequence() -> tuple[Tensor, Tensor]:
    return random_sequence(LENGTH, HEADS, DIM, 1)


@pytest.fixture
def q() -> Tensor:
    return random_queries(LENGTH, HEADS * GROUP, DIM, 2)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(q: Tensor, first: int, last: int) -> Piece:
    """The queries at positions first..last - 1 of sequence 0."""
    return Piece(0, q[first:last], last)


def whole(ops, cache: Paged, q: Tensor) -> Tensor:
    return cache.attend(ops, [rows(q, 0, LENGTH)])


def test_decoding_equals_prefilling(case, sequence, q):
    ops, dtype = case
    cache = paged(ops, [sequence], dtype)
    prefilled = whole(ops, cache, q)
    for position in POSITIONS:
        assert torch.equal(cache.attend(ops, [rows(q, position, position + 1)])[0], prefilled[position]), position


def test_any_chunks_equal_the_whole(case, sequence, q):
    ops, dtype = case
    cache = paged(ops, [sequence], dtype)
    prefilled = whole(ops, cache, q)
    random = torch.Generator().manual_seed(3)
    for _ in range(2):
        cuts = torch.randperm(LENGTH - 1, generator=random)[:9].add(1).sort().values.tolist()
        bounds = zip([0, *cuts], [*cuts, LENGTH], strict=True)
        chunks = [cache.attend(ops, [rows(q, first, last)]) for first, last in bounds]
        assert torch.equal(torch.cat(chunks), prefilled)


def test_a_batch_equals_each_alone(case, sequence, q):
    ops, dtype = case
    others = [random_sequence(length, HEADS, DIM, 10 + length) for length in (1, 77, 600)]
    together = paged(ops, [others[0], sequence, others[1], others[2]], dtype, seed=4)
    alone = paged(ops, [sequence], dtype)
    pieces = [
        Piece(0, q[:1], 1),
        Piece(1, q[900:LENGTH], LENGTH),
        Piece(2, q[40:77], 77),
        Piece(3, q[599:600], 600),
        Piece(1, q[700:701], 701),
    ]
    result = together.attend(ops, pieces, padding=3)
    prefilled = whole(ops, alone, q)
    assert torch.equal(result[1:191], prefilled[900:])
    assert torch.equal(result[229], prefilled[700])
    assert torch.equal(result[230:], torch.zeros(3, HEADS * GROUP, DIM))


def test_place_and_size_of_blocks_change_nothing(case, sequence, q):
    ops, dtype = case
    prefilled = whole(ops, paged(ops, [sequence], dtype), q)
    for block_size, seed in ((64, 5), (16, 6), (512, 7)):
        cache = paged(ops, [sequence], dtype, block_size, seed)
        assert torch.equal(whole(ops, cache, q), prefilled)
        assert torch.equal(cache.attend(ops, [rows(q, LENGTH - 1, LENGTH)])[0], prefilled[-1])


def test_threads_change_nothing(case, threads):
    ops, dtype = case
    k, v = random_sequence(LENGTH, HEADS, 64, 1)
    q = random_queries(LENGTH, HEADS * GROUP, 64, 2)
    cache = paged(ops, [(k, v)], dtype)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([cache.attend(ops, [rows(q, first, LENGTH)]) for first in (LENGTH - 1, LENGTH - 5, LENGTH - 40)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unwritten_memory_has_no_influence(case, sequence, q):
    ops, dtype = case
    results = [whole(ops, paged(ops, [sequence], dtype, unused=unused), q) for unused in (0.0, torch.nan, torch.inf)]
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_touches_only_the_rows_that_see_it(name, dtype, q):
    ops = backend(name)
    k, v = random_sequence(LENGTH, HEADS, DIM, 1)
    expected = whole(ops, paged(ops, [(k, v)], dtype), q)
    for position in (700, 701):
        broken_k, broken_v = k.clone(), v.clone()
        broken_k[position] = torch.nan
        broken_v[position] = torch.inf
        for sequence in ((broken_k, v), (k, broken_v)):
            result = whole(ops, paged(ops, [sequence], dtype), q)
            assert torch.equal(result[:position], expected[:position])
            assert not result[position:].isfinite().any()


def test_a_wrong_position_is_noticed(case, sequence, q):
    """The comparisons above can fail: one token more or less, or one in another place, changes bits."""
    ops, dtype = case
    cache = paged(ops, [sequence], dtype)
    right = cache.attend(ops, [Piece(0, q[600:601], 601)])
    assert not torch.equal(cache.attend(ops, [Piece(0, q[600:601], 600)]), right)
    assert not torch.equal(cache.attend(ops, [Piece(0, q[600:601], 602)]), right)
    k, v = (x.clone() for x in sequence)
    for x in (k, v):
        x[[30, 31]] = x[[31, 30]]
    swapped = paged(ops, [(k, v)], dtype).attend(ops, [Piece(0, q[30:31], 31)])
    assert not torch.equal(swapped, cache.attend(ops, [Piece(0, q[30:31], 31)]))
