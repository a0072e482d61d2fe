import pytest
import torch

from kvist.ops import packing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def planes(dtype: torch.dtype, block_size: int, blocks: int = 5, heads: int = 2, dim: int = 24):
    keys = torch.full(packing.key_plane_shape(blocks, heads, block_size, dim, dtype), torch.nan, dtype=dtype)
    values = torch.full(packing.value_plane_shape(blocks, heads, block_size, dim, dtype), torch.nan, dtype=dtype)
    return keys, values


@pytest.mark.parametrize("block_size", [16, 64, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_scattered_is_gathered_and_nothing_else(dtype, block_size):
    keys, values = planes(dtype, block_size)
    table = torch.tensor([3, 0, 4], dtype=torch.int32)
    count = 2 * block_size + 5
    k, v = (torch.randn(count, 2, 24).to(dtype).float() for _ in range(2))
    token = torch.arange(count)
    slots = table.long()[token // block_size] * block_size + token % block_size
    order = torch.randperm(count)
    packing.scatter_keys(keys, slots[order], k[order])
    packing.scatter_values(values, slots[order], v[order])
    assert torch.equal(packing.gather_keys(keys, table, count), k)
    assert torch.equal(packing.gather_values(values, table, count), v)
    assert keys.isnan().sum() == values.isnan().sum() == (5 * block_size - count) * 2 * 24


def test_layout_of_a_float_plane():
    keys, values = planes(torch.float32, 32)
    x = torch.randn(1, 2, 24)
    packing.scatter_keys(keys, torch.tensor([2 * 32 + 21]), x)
    packing.scatter_values(values, torch.tensor([2 * 32 + 21]), x)
    assert keys[2, 1, 1, 7, 5] == x[0, 1, 7]  # token 21 = tile 1, lane 5
    assert values[2, 1, 21, 7] == x[0, 1, 7]


def test_layout_of_a_bfloat16_plane_pairs_dims_of_keys_and_tokens_of_values():
    keys, values = planes(torch.bfloat16, 32)
    x = torch.randn(1, 2, 24).bfloat16()
    packing.scatter_keys(keys, torch.tensor([2 * 32 + 21]), x)
    packing.scatter_values(values, torch.tensor([2 * 32 + 21]), x)
    assert keys[2, 1, 1, 3, 5].tolist() == x[0, 1, 6:8].tolist()
    assert values[2, 1, 10, 7, 1] == x[0, 1, 7]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "reason"),
    [
        (torch.float64, 64, 64, "not float64"),
        (torch.float32, 20, 64, "head_dim"),
        (torch.float32, 520, 64, "head_dim"),
        (torch.bfloat16, 64, 48, "block_size"),
        (torch.bfloat16, 64, 1024, "block_size"),
    ],
)
def test_planes_that_do_not_exist(dtype, head_dim, block_size, reason):
    assert reason in packing.unsupported(dtype, head_dim, block_size)
    with pytest.raises(ValueError, match=reason):
        packing.key_plane_shape(1, 1, block_size, head_dim, dtype)


def test_planes_that_do_not_belong_together():
    keys, values = planes(torch.float32, 32)
    assert packing.geometry(keys, values) == packing.Geometry(5, 2, 32, 24, torch.float32)
    with pytest.raises(ValueError, match="value plane"):
        packing.geometry(keys, values[:4])
    with pytest.raises(ValueError, match="dimensions"):
        packing.geometry(keys[0], values)
    with pytest.raises(ValueError, match="contiguous"):
        packing.geometry(keys, values.transpose(2, 3).contiguous().transpose(2, 3))
