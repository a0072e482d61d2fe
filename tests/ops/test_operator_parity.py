"""The compiled operators against the reference, and the reference against PyTorch."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from paged import COMPILED, Paged, Piece, backend, paged, random_queries, random_sequence

# dim, KV heads, query heads per KV head, block size
SHAPES = [
    (8, 2, 1, 16),
    (48, 1, 19, 64),
    (64, 3, 3, 64),
    (72, 1, 4, 512),
    (80, 1, 7, 128),
    (128, 2, 4, 32),
    (256, 1, 2, 64),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1030, 3, 513, 70)
QUERIES = (9, 3, 1, 33)


def ragged(dim: int, heads: int, group: int, block_size: int, dtype: torch.dtype) -> tuple[Paged, list[Piece]]:
    sequences = [random_sequence(length, heads, dim, seed) for seed, length in enumerate(LENGTHS)]
    pieces = [
        Piece(i, random_queries(count, heads * group, dim, 10 + i), length)
        for i, (count, length) in enumerate(zip(QUERIES, LENGTHS, strict=True))
    ]
    return paged(backend("reference"), sequences, dtype, block_size), pieces


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_attention_agrees_with_the_reference(shape, dtype):
    cache, pieces = ragged(*shape, dtype)
    expected = cache.attend(backend("reference"), pieces, padding=2)
    for name in COMPILED:
        error = (cache.attend(backend(name), pieces, padding=2) - expected).abs()
        if dtype is torch.bfloat16:
            # A weight whose float32 value lies at the middle of two bf16 numbers may round to either: one step of
            # 2^-8 of one weight, rarely.
            assert error.max() < 2e-3
            assert error.mean() < 1e-6
        else:
            assert error.max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_attention_agrees_with_pytorch(shape, dtype):
    cache, pieces = ragged(*shape, dtype)
    result = cache.attend(backend("reference"), pieces)
    dim, heads, _, _ = shape
    first = 0
    for seed, piece in enumerate(pieces):
        k, v = (x.to(dtype).double().transpose(0, 1) for x in random_sequence(piece.length, heads, dim, seed))
        q = (piece.q.bfloat16() if dtype is torch.bfloat16 else piece.q).double().transpose(0, 1)
        mask = torch.ones(len(piece.q), piece.length, dtype=torch.bool).tril(piece.length - len(piece.q))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        error = (result[first : first + len(piece.q)] - expected).abs().max()
        assert error < (1e-2 if dtype is torch.bfloat16 else 2e-6)  # bf16 also rounds the weights
        first += len(piece.q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_queries_give_the_rounded_result_of_the_same_queries_in_float32(dtype):
    cache, pieces = ragged(64, 3, 3, 64, torch.float16)
    narrow = [Piece(p.sequence, p.q.to(dtype), p.length) for p in pieces]
    wide = [Piece(p.sequence, p.q.to(dtype).float(), p.length) for p in pieces]
    for name in ("reference", *COMPILED):
        result = cache.attend(backend(name), narrow)
        assert result.dtype is dtype
        assert torch.equal(result, cache.attend(backend(name), wide).to(dtype))


@pytest.mark.parametrize("name", COMPILED)
def test_queries_may_be_a_view_of_a_wider_row(name):
    cache, pieces = ragged(64, 3, 3, 64, torch.bfloat16)
    q = torch.cat([piece.q for piece in pieces])
    wider = torch.cat([q, torch.randn(len(q), 6, 64)], dim=1)
    views = [
        Piece(p.sequence, wider[low:high, :9], p.length)
        for p, (low, high) in zip(pieces, pairwise([0, 9, 12, 13, 46]), strict=True)
    ]
    ops = backend(name)
    alone = [cache.attend(ops, [view]) for view in views]
    assert not views[0].q.is_contiguous()
    assert torch.equal(torch.cat(alone), cache.attend(ops, pieces))


def test_the_backends_are_different_implementations():
    sets = [backend(name).instruction_set for name in ("reference", *COMPILED)]
    assert sets[0] == "PyTorch"
    assert sets[1] in ("avx512_bf16", "avx512", "avx2", "portable")
    assert sets[2:] == list(COMPILED[1:])
