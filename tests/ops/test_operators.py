"""What the operators refuse, what they store, and what PyTorch checks of any operator."""

import pytest
import torch
from paged import BACKENDS, Paged, Piece, backend, int32, paged, random_queries, random_sequence

from kvist.ops.packing import gather_keys, gather_values, key_plane_shape, value_plane_shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, DIM, LENGTH = 2, 16, 100


def cache_of(name: str, dtype: torch.dtype = torch.float32) -> Paged:
    return paged(backend(name), [random_sequence(LENGTH, HEADS, DIM, 1)], dtype, 32)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_writing_rounds_as_pytorch_does(name, dtype, source):
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 65519, 65520, 70000, 3.4e38, 1e-8, -6e-8]
    )
    bits = torch.randint(-(2**31), 2**31, (40 * HEADS * 24 - len(special),), dtype=torch.int64).int()
    x = torch.cat([special, bits.view(torch.float32)]).view(40, HEADS, 24).to(source)
    keys = torch.zeros(key_plane_shape(2, HEADS, 32, 24, dtype), dtype=dtype)
    values = torch.zeros(value_plane_shape(2, HEADS, 32, 24, dtype), dtype=dtype)
    backend(name).write(keys, values, x, x, torch.arange(40))
    expected = x.to(dtype).float()
    for stored in (gather_keys(keys, int32([0, 1]), 40), gather_values(values, int32([0, 1]), 40)):
        assert torch.equal(stored.isnan(), expected.isnan())
        assert torch.equal(stored.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_planes_written_by_any_backend_have_the_same_bytes(dtype):
    written = [cache_of(name, dtype) for name in BACKENDS]
    for other in written[1:]:
        assert torch.equal(other.keys.view(torch.uint8), written[0].keys.view(torch.uint8))
        assert torch.equal(other.values.view(torch.uint8), written[0].values.view(torch.uint8))


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_rows_are_not_written_and_views_may_be(name):
    cache = cache_of(name, torch.bfloat16)
    keys, values = cache.keys.clone(), cache.values.clone()
    qkv = torch.randn(3, HEADS * 3, DIM)
    slot = int(cache.tables[0, 1]) * 32 + 3
    backend(name).write(keys, values, qkv[:, 2:4], qkv[:, 4:], torch.tensor([-1, slot, -1]))
    changed = gather_keys(keys, cache.tables[0], LENGTH), gather_values(values, cache.tables[0], LENGTH)
    before = gather_keys(cache.keys, cache.tables[0], LENGTH), gather_values(cache.values, cache.tables[0], LENGTH)
    others = torch.arange(LENGTH) != 35
    assert all(torch.equal(a[others], b[others]) for a, b in zip(changed, before, strict=True))
    assert torch.equal(changed[0][35], qkv[1, 2:4].bfloat16().float())
    assert torch.equal(changed[1][35], qkv[1, 4:].bfloat16().float())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"slots": torch.tensor([0, 7 * 32])}, IndexError, "slots must be -1"),
        ({"slots": torch.tensor([0, -2])}, IndexError, "slots must be -1"),
        ({"slots": int32([0, 1])}, ValueError, "int64"),
        ({"slots": torch.tensor([0])}, ValueError, "needs k and v"),
        ({"k": torch.randn(2, HEADS + 1, DIM)}, ValueError, "needs k and v"),
        ({"v": torch.randn(2, HEADS, DIM).half()}, ValueError, "one"),
        ({"values": torch.zeros(7, HEADS, 32, DIM + 8)}, ValueError, "value plane"),
        ({"keys": torch.zeros(7, HEADS, 2, DIM, 16, dtype=torch.float64)}, ValueError, "float32"),
    ],
)
def test_writes_that_are_refused(name, change, error, message):
    cache = cache_of(name)
    before = cache.keys.clone()
    arguments = {
        "keys": cache.keys,
        "values": cache.values,
        "k": torch.randn(2, HEADS, DIM),
        "v": torch.randn(2, HEADS, DIM),
        "slots": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        backend(name).write(**(arguments | change))
    assert torch.equal(cache.keys.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(5, HEADS * 2, DIM + 8)}, ValueError, "needs q"),
        ({"q": torch.randn(5, HEADS * 2 + 1, DIM)}, ValueError, "needs q"),
        ({"q": torch.randn(5, HEADS * 2, DIM).double()}, ValueError, "float32"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"tables": torch.tensor([[0, 1, 2, 3]])}, ValueError, "int32"),
        ({"tables": int32([0, 1, 2, 3])}, ValueError, "tables"),
        ({"tables": int32([0, 1, 2, 7]).view(1, 4)}, IndexError, "block ids"),
        ({"tables": int32([0, -1, 2, 3]).view(1, 4)}, IndexError, "block ids"),
        ({"starts": int32([0, 6])}, ValueError, "starts"),
        ({"starts": int32([1, 5])}, ValueError, "starts"),
        ({"starts": int32([0, -1])}, ValueError, "starts"),
        ({"starts": int32([0, 5, 5])}, ValueError, "starts"),
        ({"lengths": int32([4])}, ValueError, "lengths"),
        ({"lengths": int32([129])}, ValueError, "lengths"),
        ({"lengths": int32([-1])}, ValueError, "lengths"),
    ],
)
def test_metadata_that_is_refused(name, change, error, message):
    cache = cache_of(name)
    arguments = {
        "q": torch.randn(5, HEADS * 2, DIM),
        "keys": cache.keys,
        "values": cache.values,
        "tables": cache.tables,
        "starts": int32([0, 5]),
        "lengths": int32([LENGTH]),
        "scale": 0.25,
    }
    assert backend(name).attend(**arguments).isfinite().all()
    with pytest.raises(error, match=message):
        backend(name).attend(**(arguments | change))


@pytest.mark.parametrize("name", BACKENDS)
def test_calls_without_queries(name):
    cache, ops = cache_of(name), backend(name)
    q = random_queries(3, HEADS, DIM, 0)
    nothing = ops.attend(q[:0], cache.keys, cache.values, cache.tables, int32([0, 0]), int32([50]), 1.0)
    assert nothing.shape == (0, HEADS, DIM)
    no_sequences = ops.attend(q, cache.keys, cache.values, cache.tables[:0], int32([0]), int32([]), 1.0)
    assert torch.equal(no_sequences, torch.zeros_like(q))
    between = cache.attend(ops, [Piece(0, q[:0], 20), Piece(0, q, 90)])
    assert torch.equal(between, cache.attend(ops, [Piece(0, q, 90)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_satisfy_pytorch(name, dtype):
    ops, cache = backend(name), cache_of(name, dtype)
    planes = (cache.keys.nan_to_num(), cache.values.nan_to_num())
    vectors = (torch.randn(3, HEADS, DIM), torch.randn(3, HEADS, DIM), torch.tensor([5, -1, 9]))
    metadata = (cache.tables, int32([0, 4]), int32([LENGTH]), 0.25)
    for operator, arguments in (
        (ops.write, (*planes, *vectors)),
        (ops.attend, (torch.randn(5, HEADS * 2, DIM), *planes, *metadata)),
        (ops.silu_mul, (torch.randn(5, 12).to(dtype),)),
        (ops.gelu, (torch.randn(5, 12).to(dtype), True)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}
