import pytest
import torch
import torch.nn.functional as F
from paged import BACKENDS, backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUNCTIONS = {
    "silu_mul": lambda ops, x: ops.silu_mul(torch.cat([x, x.flip(-1)], -1)),
    "gelu": lambda ops, x: ops.gelu(x, False),
    "gelu_tanh": lambda ops, x: ops.gelu(x, True),
}
ORACLES = {
    "silu_mul": lambda x: F.silu(x) * x.flip(-1),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_values(name, function):
    x = torch.cat([torch.randn(5, 77) * 4, torch.linspace(-100, 100, 77)[None], torch.zeros(1, 77)])
    result = FUNCTIONS[function](backend(name), x)
    torch.testing.assert_close(result.double(), ORACLES[function](x.double()), rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_narrow_numbers_are_computed_in_float32_and_rounded_once(name, function, dtype):
    x = (torch.randn(3, 77) * 4).to(dtype)
    ops = backend(name)
    assert torch.equal(FUNCTIONS[function](ops, x), FUNCTIONS[function](ops, x.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_does_not_depend_on_its_place(name, function, dtype):
    ops = backend(name)
    row = (torch.randn(1, 83) * 3).to(dtype)
    alone = FUNCTIONS[function](ops, row)
    for rows, place in ((2, 1), (300, 0), (300, 299), (301, 150)):
        x = torch.randn(rows, 83).to(dtype)
        x[place] = row
        assert torch.equal(FUNCTIONS[function](ops, x)[place], alone[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_exp_is_accurate(name):
    """silu(x) = x e^x for x below -20, to float32: there silu shows the exponential that it is made from."""
    x = -torch.linspace(20, 87, 200_000)
    result = backend(name).silu_mul(torch.stack([x, torch.ones_like(x)], 0).T.contiguous()).flatten()
    expected = x.double() / (1 + torch.exp(-x.double()))
    assert ((result - expected) / expected).abs().max() < 4 * 2**-24


@pytest.mark.parametrize("name", BACKENDS)
def test_extremes(name):
    ops = backend(name)
    x = torch.tensor([[torch.inf, -1e30, 1e30, torch.nan]])
    silu = ops.silu_mul(torch.cat([x, torch.ones_like(x)], -1))[0]
    assert silu[:3].tolist() == [torch.inf, 0, x[0, 2]]
    assert silu[3].isnan()
    for tanh in (False, True):
        gelu = ops.gelu(x, tanh)[0]
        assert gelu[0] == torch.inf
        assert gelu[1] == 0
        assert gelu[3].isnan()


@pytest.mark.parametrize("name", BACKENDS)
def test_shapes(name):
    ops = backend(name)
    assert ops.silu_mul(torch.randn(2, 3, 8)).shape == (2, 3, 4)
    assert ops.silu_mul(torch.randn(0, 8)).shape == (0, 4)
    wide = torch.randn(6, 32)
    assert torch.equal(ops.gelu(wide[:, ::2], True), ops.gelu(wide, True)[:, ::2])
    with pytest.raises(ValueError, match="2I"):
        ops.silu_mul(torch.randn(2, 7))
    with pytest.raises(ValueError, match="float"):
        ops.gelu(torch.arange(3), True)
