"""The compiled `seal` against coding.py, which says what it computes."""

import pytest
import torch
from paged import COMPILED, backend
from torch import Tensor

from kvist.cache.codecs.codebook import segment
from kvist.ops import coding, packing
from kvist.ops.coding import Coding, Frame, Rule, Segment, rotation_blocks

HEADS = 2
INT4 = tuple(range(-64, 64, 8))


def by_levels(rule: Rule, *parts: tuple[int, int]) -> Coding:
    """Rotated segments of (dims, bits) with the levels of a codebook."""
    blocks = tuple(block for dims, _ in parts for block in rotation_blocks(dims))
    return Coding(tuple(segment(dims, bits) for dims, bits in parts), rule, blocks)


# Every rule, every number of bits, one and several segments, rotated and not.
CODINGS = {
    "unbiased4": by_levels(Rule.UNBIASED, (64, 4)),
    "unbiased3": by_levels(Rule.UNBIASED, (48, 3)),
    "nearest2": by_levels(Rule.LEAST_SQUARES, (128, 2)),
    "nearest4": by_levels(Rule.LEAST_SQUARES, (256, 4)),
    "outliers": by_levels(Rule.UNBIASED, (16, 3), (64, 2)),
    "groups": Coding((Segment(32, 4, INT4), Segment(32, 4, INT4), Segment(16, 4, INT4)), Rule.SIGNED_MAX),
    "absmax8": Coding((Segment(64, 8), Segment(16, 8)), Rule.ABSMAX),
    "absmax8-rotated": Coding((Segment(64, 8),), Rule.ABSMAX, (32, 16, 16)),
    "unbiased8": Coding((Segment(32, 8, (), 40.0),), Rule.UNBIASED, (32,)),
}

each_coding = pytest.mark.parametrize("how", CODINGS.values(), ids=CODINGS)
each_backend = pytest.mark.parametrize("name", COMPILED)


def frame(how: Coding) -> Frame:
    """A mean, and channels in an order of each head's own."""
    mean = torch.randn(HEADS, how.dim)
    order = torch.stack([torch.randperm(how.dim) for _ in range(HEADS)]).int()
    return Frame(mean, order, coding.signs(how.dim))


def open_plane(x: Tensor, keys: bool, block_size: int, dtype: torch.dtype) -> Tensor:
    """x [T, H, D] in the blocks of a plane, one after another."""
    shape_of = packing.key_plane_shape if keys else packing.value_plane_shape
    scatter = packing.scatter_keys if keys else packing.scatter_values
    plane = torch.full(shape_of(len(x) // block_size, HEADS, block_size, x.shape[2], dtype), torch.nan, dtype=dtype)
    scatter(plane, torch.arange(len(x)), x)
    return plane


def empty(how: Coding, blocks: int, block_size: int) -> list[Tensor]:
    codes = torch.full((blocks, HEADS, how.code_bytes(block_size)), 0x5A, dtype=torch.uint8)
    return [codes, torch.full((blocks, HEADS, len(how.segments), block_size), torch.nan, dtype=torch.float16)]


def seal(name: str, x: Tensor, how: Coding, where: Frame, keys: bool, block_size: int, dtype=torch.float32):
    """Codes [T, H, D] and scales [T, H, segments] of x [T, H, D] by the operator."""
    blocks = len(x) // block_size
    planes, targets = empty(how, blocks + 1, block_size), torch.arange(1, blocks + 1).flip(0)
    plane = open_plane(x, keys, block_size, dtype)
    backend(name).seal(plane, planes, how.flat(), where.tensors(how), keys, torch.arange(blocks), targets)
    assert (planes[0][0] == 0x5A).all(), "a block that is no target"
    assert planes[1][0].isnan().all()
    codes = torch.cat([coding.unpack_block(planes[0][t], how, keys, block_size) for t in targets.tolist()])
    return codes, planes[1][targets].permute(0, 3, 1, 2).flatten(0, 1)


def unlike(codes: Tensor, scales: Tensor, expected: tuple[Tensor, Tensor]) -> Tensor:
    """[T, H]: the vectors whose codes or scales are not those expected, up to one step of float16 in a scale."""
    steps = (scales.view(torch.int16).int() - expected[1].view(torch.int16).int()).abs()
    return (codes != expected[0]).any(-1) | (steps > 1).any(-1)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@each_coding
@each_backend
def test_codes_and_scales_are_those_of_the_definition(name, how, keys, block_size):
    torch.manual_seed(1)
    x, where = torch.randn(256, HEADS, how.dim) * torch.rand(256, 1, 1) * 5 + 2, frame(how)
    codes, scales = seal(name, x, how, where, keys, block_size)
    expected = coding.encode(x, how, where)
    differ = unlike(codes, scales, expected)
    # Sums in another order can take a number over a border, or prefer another of two fits that are equally good.
    assert differ.float().mean() < 0.01
    assert (codes - expected[0]).abs().max() <= 1
    assert (codes != expected[0]).float().mean() <= 1e-4 or how.rule in (Rule.UNBIASED, Rule.LEAST_SQUARES)
    original = coding.into_frame(x, how, where, centre=True)
    errors = [(coding.dequantize(*coded, how) - original).norm(dim=-1) for coded in ((codes, scales), expected)]
    torch.testing.assert_close(*errors, rtol=2e-3, atol=1e-6)


@each_coding
def test_all_instruction_sets_give_the_same_codes(how):
    torch.manual_seed(2)
    x, where = torch.randn(128, HEADS, how.dim), frame(how)
    first, *others = [seal(name, x, how, where, True, 64) for name in COMPILED]
    for codes, scales in others:
        assert unlike(codes, scales, first).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@each_backend
def test_open_blocks_may_be_of_any_type(name, keys, dtype):
    how = CODINGS["absmax8"]
    torch.manual_seed(3)
    x, where = torch.randn(128, HEADS, how.dim).to(dtype), frame(how)
    narrow = seal(name, x, how, where, keys, 64, dtype)
    wide = seal(name, x.float(), how, where, keys, 64)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("target", packing.DTYPES)
@pytest.mark.parametrize("source", packing.DTYPES)
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@each_backend
def test_without_a_coding_blocks_are_copied_and_rounded(name, keys, source, target):
    x = torch.randn(64, HEADS, 24).to(source)
    plane, copy = open_plane(x, keys, 32, source), open_plane(torch.zeros(96, HEADS, 24), keys, 32, target)
    backend(name).seal(plane, [copy], [], [], keys, torch.tensor([1, 0]), torch.tensor([0, 2]))
    gather = packing.gather_keys if keys else packing.gather_values
    expected = x.to(target).float()
    stored = gather(copy, torch.arange(3, dtype=torch.int32), 96)
    assert torch.equal(stored, torch.cat([expected[32:], torch.zeros(32, HEADS, 24), expected[:32]]))


@each_coding
@each_backend
def test_zeros_have_the_scale_zero(name, how):
    x = torch.randn(64, HEADS, how.dim)
    x[7] = 0
    x[9] = 1e-12
    _, scales = seal(name, x, how, Frame.plain(HEADS, how.dim), True, 64)
    assert not scales[7].any()
    assert scales.isfinite().all()
    assert scales[8].abs().min() > 0


@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@each_coding
@each_backend
def test_what_is_no_number_makes_scales_that_are_none(name, how, keys):
    torch.manual_seed(4)
    x, where = torch.randn(64, HEADS, how.dim), Frame.plain(HEADS, how.dim)
    clean, clean_scales = seal(name, x, how, where, keys, 64)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[5, 1, 3] = bad
        codes, scales = seal(name, spoiled, how, where, keys, 64)
        assert not scales[5, 1].isfinite().all()
        others = torch.ones(64, HEADS, dtype=torch.bool)
        others[5, 1] = False
        assert torch.equal(codes[others], clean[others])
        assert torch.equal(scales[others], clean_scales[others])


@each_backend
def test_threads_change_no_bit(name):
    how = CODINGS["unbiased4"]
    x, where = torch.randn(512, HEADS, how.dim), frame(how)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(seal(name, x, how, where, False, 64))
    for codes, scales in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(scales, results[0][1])


def test_the_comparison_notices_other_levels():
    """A tenth of a deviation more in every level: other codes."""
    how = CODINGS["groups"]
    x, where = torch.randn(64, HEADS, how.dim), Frame.plain(HEADS, how.dim)
    moved = tuple(level + (3 if level > -64 else 0) for level in INT4)
    other = Coding(tuple(Segment(s.dims, 4, moved) for s in how.segments), how.rule)
    assert unlike(*seal("cpu", x, other, where, True, 64), coding.encode(x, how, where)).float().mean() > 0.5
