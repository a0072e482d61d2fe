"""Packed weights: what they hold, and products of them that are exact and the same wherever a row stands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import BACKENDS, backend

from kvist.ops import packed
from kvist.ops.packed import PackedForm, group_for
from kvist.ops.reference_packed import code_rows

EPS = 1e-5


def pack(rows: int, columns: int, bits: int, paired: bool = False, group: int | None = None, spread: float = 0.1):
    """A random weight: packed, its form, and the numbers that it holds then [rows, columns]."""
    form = PackedForm(rows, columns, bits, group or group_for(columns, bits), paired)
    data = packed.empty(form)
    packed.put_rows(data, form, 0, torch.randn(rows, columns) * spread)
    return data, form.flat(), packed.get_rows(data, form)


def exact(x: torch.Tensor, held: torch.Tensor, form: list[int]) -> torch.Tensor:
    """The product in float64, of rows that are made whole as the operators do it."""
    codes, scales = code_rows(x, form[3])
    rows = (codes * scales[:, :, None].double()).flatten(1)[:, : form[1]]
    return rows @ held.double().T


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), EPS).float()


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96]),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_a_weight_holds_what_is_put_there(rows, columns, bits, group, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    paired = rows % 2 == 0 and seed % 2 == 0
    form = PackedForm(rows, columns, bits, group, paired)
    data, first = packed.empty(form), int(cut * rows)
    packed.put_rows(data, form, 0, w[:first])
    packed.put_rows(data, form, first, w[first:])
    codes, scales = packed.quantize(w, bits, group)
    held_codes, held_scales = packed.get_codes(data, form)
    assert torch.equal(held_codes, codes)
    assert torch.equal(held_scales, scales)
    steps = scales.float().abs().repeat_interleave(group, 1)[:, :columns]
    reach = 0.51 if bits == 8 else 4.2  # 4 bits cut the largest numbers where others gain by it
    assert (packed.get_rows(data, form) - w).abs().div(steps).max() <= reach
    if first < rows:
        assert torch.equal(packed.get_rows(data, form, first), packed.get_rows(data, form)[first:])
    assert form.nbytes == data.nbytes


@pytest.mark.parametrize(("bits", "most"), [(8, 0.0071), (4, 0.083)])
def test_what_rounding_loses(bits, most):
    """Of normal numbers, relative, in squares: 8 bits in groups of 256, 4 bits in groups of 32."""
    torch.manual_seed(0)
    w = torch.randn(256, 1024)
    form = PackedForm(*w.shape, bits, group_for(w.shape[1], bits))
    data = packed.empty(form)
    packed.put_rows(data, form, 0, w)
    lost = float((packed.get_rows(data, form) - w).norm() / w.norm())
    assert 0.9 * most < lost < most
    if bits == 4:  # better than the usual rule, where the number farthest from zero becomes -8
        groups = w.view(-1, 32)
        scales = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
        usual = (groups / scales).round().clamp(-8, 7) * scales
        assert lost < 0.96 * float((usual - groups).norm() / w.norm())


@pytest.mark.parametrize(
    ("columns", "bits", "group"),
    [
        (576, 8, 192),
        (2048, 8, 256),
        (4864, 8, 256),
        (896, 8, 224),
        (172, 8, 192),
        (64, 8, 64),
        (8, 8, 32),
        (576, 4, 32),
    ],
)
def test_how_many_columns_share_a_scale(columns, bits, group):
    assert group_for(columns, bits) == group


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_products(name, bits):
    ops = backend(name)
    for rows, columns, group in ((1, 32, 32), (70, 172, 32), (192, 576, 192), (130, 200, 64)):
        data, form, held = pack(rows, columns, bits, group=group)
        x, bias, norm = torch.randn(9, columns), torch.randn(rows), torch.rand(columns) + 0.5
        torch.testing.assert_close(
            ops.packed_linear(x, None, EPS, data, form, bias).double(),
            exact(x, held, form) + bias,
            rtol=1e-5,
            atol=2e-6,
        )
        normed = ops.packed_linear(x, norm, EPS, data, form, None)
        torch.testing.assert_close(normed.double(), exact(rms_norm(x, norm), held, form), rtol=1e-2, atol=3e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_variants_have_the_same_bits(bits):
    data, form, _ = pack(200, 456, bits)
    x = torch.randn(11, 456) * 3
    results = [backend(name).packed_linear(x, None, EPS, data, form, None) for name in BACKENDS if name != "reference"]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_sums_of_a_group_are_exact():
    """The widest sums there are, which saturate instructions that multiply bytes into 16 bits."""
    form = PackedForm(64, 256, 8, 256)
    data = packed.empty(form)
    packed.put_codes(data, form, 0, torch.full((64, 256), 127, dtype=torch.int8), torch.ones(64, 1).half())
    for x in (torch.full((1, 256), 127.0), torch.full((1, 256), -127.0)):
        for name in BACKENDS:
            out = backend(name).packed_linear(x, None, EPS, data, form.flat(), None)
            assert torch.equal(out, torch.full((1, 64), 127.0 * float(x[0, 0]) * 256))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_does_not_depend_on_its_place(name, bits):
    """Nor on how many rows there are, which decides who computes what; nor on the number of threads."""
    ops = backend(name)
    layer = Layer(bits)
    row = layer.rows(1, seed=5)
    alone = layer.run(ops, row)
    for rows, place in ((2, 1), (3, 0), (7, 6), (40, 17), (300, 299)) if name != "reference" else ((3, 1), (20, 19)):
        many = [torch.cat([x[:place], own, x[place + 1 :]]) for x, own in zip(layer.rows(rows), row, strict=True)]
        assert all(torch.equal(a[place], b[0]) for a, b in zip(layer.run(ops, many), alone, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(layer.run(ops, row), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


class Layer:
    """What stands before and behind an attention, in every variant that the operators know."""

    hidden, inner, heads, kv_heads, dim, rotated = 96, 176, 3, 1, 32, 16

    def __init__(self, bits: int) -> None:
        h, self.bits = self.hidden, bits
        self.qkv = pack((self.heads + 2 * self.kv_heads) * self.dim, h, bits)
        self.out = pack(h, self.heads * self.dim, bits)
        self.gate_up = pack(2 * self.inner, h, bits, paired=True)
        self.down = pack(h, self.inner, bits)
        self.norms = [torch.rand(h) + 0.5 for _ in range(4)]
        self.head_norms = [torch.rand(self.dim) + 0.5 for _ in range(2)]
        self.biases = [torch.randn(160), torch.randn(h)]

    def rows(self, count: int, seed: int = 1) -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        angles = torch.randn(count, 1, self.rotated, generator=g)
        attended = torch.randn(count, self.heads * self.dim, generator=g)
        return [torch.randn(count, self.hidden, generator=g), attended, angles.cos(), angles.sin()]

    def run(self, ops, rows, plain: bool = False, gelu: bool = False) -> list[torch.Tensor]:
        x, attended, cos, sin = rows
        heads = [self.heads, self.kv_heads, self.dim]
        q_norm, k_norm = (None, None) if plain else self.head_norms
        qkv_bias, out_bias = (None, None) if plain else self.biases
        out_norm, down_norm = (None, None) if plain else self.norms[2:]
        angles = (None, None) if plain else (cos, sin)
        before = ops.packed_project(x, self.norms[0], EPS, *self.qkv[:2], qkv_bias, heads, q_norm, k_norm, *angles)
        behind = ops.packed_ending(
            x,
            attended,
            *self.out[:2],
            out_bias,
            out_norm,
            self.norms[1],
            EPS,
            *self.gate_up[:2],
            *self.down[:2],
            down_norm,
            gelu,
        )
        return [before, behind]


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_stands_around_an_attention(name, bits, gelu, plain):
    """Against the same steps one by one, products by `packed_linear`."""
    ops, layer = backend(name), Layer(bits)
    x, attended, cos, sin = rows = layer.rows(13)
    before, behind = layer.run(ops, rows, plain, gelu)
    qkv_bias, out_bias = (None, None) if plain else layer.biases
    expected = ops.packed_linear(x, layer.norms[0], EPS, *layer.qkv[:2], qkv_bias).unflatten(1, (-1, layer.dim)).clone()
    if not plain:
        for part, norm in ((expected[:, :3], layer.head_norms[0]), (expected[:, 3:4], layer.head_norms[1])):
            part.copy_(rms_norm(part, norm))
            first, second = part[..., : layer.rotated].clone().chunk(2, -1)
            half = layer.rotated // 2
            part[..., :half] = first * cos[..., :half] - second * sin[..., :half]
            part[..., half : layer.rotated] = second * cos[..., half:] + first * sin[..., half:]
    torch.testing.assert_close(before, expected.flatten(1), rtol=1e-5, atol=1e-5)
    added = ops.packed_linear(attended, None, EPS, *layer.out[:2], out_bias)
    hidden = x + (added if plain else rms_norm(added, layer.norms[2]))
    held = layer.gate_up[2]
    normed = rms_norm(hidden, layer.norms[1])
    gate, up = exact(normed, held, layer.gate_up[1]).float().chunk(2, 1)
    opened = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    added = ops.packed_linear(opened * up, None, EPS, *layer.down[:2], None)
    expected = hidden + (added if plain else rms_norm(added, layer.norms[3]))
    # A number that lies on the border of two codes may fall to either side.
    torch.testing.assert_close(behind, expected, rtol=2e-2, atol=2e-2)
    assert (behind - expected).abs().median() < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_that_stay_as_they_are(name, bits):
    """Nothing but float32 is lost, and a row's bits depend on no other."""
    ops, threads = backend(name), torch.get_num_threads()
    for rows, columns in ((200, 96), (64, 100), (130, 600)):
        data, form, held = pack(rows, columns, bits)
        x, bias = torch.randn(19, columns), torch.randn(rows)
        out = ops.packed_float(x, data, form, bias)
        torch.testing.assert_close(out.double(), x.double() @ held.double().T + bias.double(), rtol=0, atol=1e-4)
        try:
            for first, last in ((0, 1), (3, 5), (4, 12), (2, 19)):
                torch.set_num_threads(1 + first % 2)
                assert torch.equal(ops.packed_float(x[first:last].contiguous(), data, form, bias), out[first:last])
        finally:
            torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="packed_float"):
        ops.packed_float(x, *pack(64, 600, bits, paired=True)[:2], None)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_finite_shows(name):
    ops = backend(name)
    data, form, _ = pack(64, 96, 8, group=32)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(3, 96)
        x[1, 40] = bad
        out = ops.packed_linear(x, None, EPS, data, form, None)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()
    assert ops.packed_linear(torch.zeros(1, 96), None, EPS, data, form, None).eq(0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_by_number(name, bits):
    ops = backend(name)
    data, form, held = pack(130, 172, bits)
    ids = torch.tensor([0, 129, 64, 64])
    assert torch.equal(ops.packed_rows(data, form, ids), held[ids])
    assert ops.packed_rows(data, form, ids[:0]).shape == (0, 172)
    for wrong in (-1, 130):
        with pytest.raises(IndexError, match="130"):
            ops.packed_rows(data, form, torch.tensor([wrong]))


@pytest.mark.parametrize("name", BACKENDS)
def test_operators_are_what_their_schemas_say(name):
    ops, layer = backend(name), Layer(8)
    x, attended, cos, sin = layer.rows(3)
    heads = [layer.heads, layer.kv_heads, layer.dim]
    calls = [
        (ops.packed_linear, (x, layer.norms[0], EPS, *layer.qkv[:2], None)),
        (ops.packed_rows, (*layer.qkv[:2], torch.tensor([1, 2]))),
        (ops.packed_project, (x, None, EPS, *layer.qkv[:2], None, heads, None, None, cos, sin)),
        (
            ops.packed_ending,
            (
                x,
                attended,
                *layer.out[:2],
                None,
                None,
                layer.norms[1],
                EPS,
                *layer.gate_up[:2],
                *layer.down[:2],
                None,
                True,
            ),
        ),
    ]
    for operator, arguments in calls:
        found = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_fit_is_refused(name):
    ops = backend(name)
    data, form, _ = pack(64, 96, 8, group=32)
    x = torch.randn(2, 96)
    for arguments in (
        (x[:, :64], None, EPS, data, form, None),
        (x.double(), None, EPS, data, form, None),
        (x, None, EPS, data[:, 1:], form, None),
        (x, None, EPS, data, [*form[:4], 1], None),
        (x, None, EPS, data.int(), form, None),
    ):
        with pytest.raises(ValueError):
            ops.packed_linear(*arguments)
