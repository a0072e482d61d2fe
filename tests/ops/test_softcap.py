"""Scores that are held within a cap, and heads of 512 numbers."""

import pytest
import torch
from coded import coded
from paged import BACKENDS, COMPILED, Piece, backend, int32, paged, random_queries, random_sequence
from torch import Tensor

LENGTH, HEADS, GROUP, DIM = 700, 2, 3, 32
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def plainly(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, cap: float) -> Tensor:
    """In float64, all queries of a sequence at once."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(GROUP, 0) for x in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(1, 2) * scale / cap)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    if window:
        seen = seen.triu(k.shape[1] - q.shape[1] + 1 - window)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def attend(ops, cache, q: Tensor, length: int, window: int, cap: float) -> Tensor:
    where = cache.tables, int32([0, len(q)]), int32([length])
    return ops.attend(q, cache.keys, cache.values, *where, cache.scale, window, cap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_capped_scores(name, dtype):
    ops = backend(name)
    k, v = random_sequence(LENGTH, HEADS, DIM, 1)
    q = 20 * random_queries(LENGTH, HEADS * GROUP, DIM, 2)
    cache = paged(ops, [(k, v)], dtype)
    k, v = k.to(dtype), v.to(dtype)
    for window, cap in ((0, 1.0), (0, 30.0), (65, 5.0)):
        found = attend(ops, cache, q[-40:], LENGTH, window, cap)
        expected = plainly(q[-40:].to(dtype), k, v, window, cache.scale, cap)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * DTYPES[dtype])
        # In any cut, to the bit.
        whole = attend(ops, cache, q, LENGTH, window, cap)
        assert torch.equal(attend(ops, cache, q[300:301], 301, window, cap), whole[300:301])
        assert not torch.allclose(attend(ops, cache, q, LENGTH, window, 0.0), whole, atol=1e-2), "it does something"
    with pytest.raises(ValueError, match="softcap"):
        attend(ops, cache, q, LENGTH, 0, -1.0)


@pytest.mark.parametrize("kv", ["int8", "turbo4"])
@pytest.mark.parametrize("name", COMPILED)
def test_capped_scores_over_codes(name, kv):
    q = 20 * random_queries(LENGTH, HEADS * GROUP, DIM, 4)
    results = []
    for ops in (backend(name), backend("reference")):
        cache = coded(ops, [random_sequence(LENGTH, HEADS, DIM, 3)], (kv, kv))
        results.append(cache.attend(ops, [Piece(0, q, LENGTH)], softcap=3.0))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=2e-2)
    assert (results[1] - cache.attend(ops, [Piece(0, q, LENGTH)])).abs().max() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPILED)
def test_wide_heads(name, dtype):
    k, v = random_sequence(200, 1, 512, 5)
    q = random_queries(200, 3, 512, 6)
    found, expected = (
        attend(ops, paged(ops, [(k, v)], dtype), q, 200, 0, 0.0) for ops in (backend(name), backend("reference"))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=DTYPES[dtype])
