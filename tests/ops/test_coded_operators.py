"""What the operators over coded blocks refuse, what `attend_own` gives, and what PyTorch checks of any operator."""

import math

import pytest
import torch
from coded import Coded, coded
from paged import BACKENDS, COMPILED, Piece, backend, int32, paged, random_queries, random_sequence
from torch import Tensor

HEADS, DIM, LENGTH, BLOCK = 2, 48, 150, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cache_of(name: str, kind: tuple[str, str] = ("turbo2.5", "int4")) -> Coded:
    return coded(backend(name), [random_sequence(LENGTH, HEADS, DIM, 1)], kind, BLOCK)


def attend_arguments(cache: Coded) -> dict[str, object]:
    q = random_queries(5, HEADS * 2, DIM, 3)
    (key_planes, key_coding, key_frame), (value_planes, value_coding, value_frame) = (
        stream.operands for stream in (cache.keys, cache.values)
    )
    return {
        "q": q,
        "own": torch.randn(q.shape),
        "lse": torch.randn(q.shape[:2]),
        "key_planes": key_planes,
        "key_coding": key_coding,
        "key_frame": key_frame,
        "value_planes": value_planes,
        "value_coding": value_coding,
        "value_frame": value_frame,
        "tables": cache.tables,
        "starts": int32([0, 5]),
        "lengths": int32([LENGTH]),
        "block_size": BLOCK,
        "scale": 0.25,
    }


def replaced(values: list, index: int, value: object) -> list:
    return [*values[:index], value, *values[index + 1 :]]


# What is done to the arguments, by whom it is refused (the reference trusts more), and what is said.
BAD_CALLS = {
    "q": (lambda a: {"q": torch.randn(5, HEADS * 2, DIM + 16)}, ValueError, "needs q"),
    "q heads": (lambda a: {"q": torch.randn(5, HEADS * 2 + 1, DIM)}, ValueError, "needs q"),
    "own": (lambda a: {"own": a["own"][:, :1]}, ValueError, "own and lse are float32"),
    "own type": (lambda a: {"own": a["own"].half()}, ValueError, "own and lse are float32"),
    "lse": (lambda a: {"lse": a["lse"][:3]}, ValueError, "own and lse are float32"),
    "scale": (lambda a: {"scale": -1.0}, ValueError, "scale"),
    "block size": (lambda a: {"block_size": 64}, ValueError, "block"),
    "tables": (lambda a: {"tables": a["tables"].long()}, ValueError, "int32"),
    "block ids": (lambda a: {"tables": a["tables"] + 100}, IndexError, "block ids"),
    "starts": (lambda a: {"starts": int32([0, 6])}, ValueError, "starts"),
    "lengths": (lambda a: {"lengths": int32([999])}, ValueError, "lengths"),
    "one plane": (lambda a: {"key_planes": a["key_planes"][:1]}, ValueError, "two planes"),
    "no frame": (lambda a: {"value_frame": []}, ValueError, "two planes"),
    "a frame of a dense stream": (
        lambda a: {"key_planes": a["key_planes"][:1], "key_coding": []},
        ValueError,
        "not coded has one plane",
    ),
    "no coding at all": (lambda a: {"key_coding": a["key_coding"][:1]}, ValueError, "coding"),
    "half a coding": (lambda a: {"key_coding": a["key_coding"][:-1]}, ValueError, "coding"),
    "a rule": (lambda a: {"key_coding": replaced(a["key_coding"], 0, 4)}, ValueError, "."),
    "blocks of the rotation": (lambda a: {"key_coding": replaced(a["key_coding"], 2, 24)}, ValueError, "."),
    "channels": (lambda a: {"value_coding": replaced(a["value_coding"], 3, 24)}, ValueError, "multiple of 16"),
    "bits": (lambda a: {"value_coding": replaced(a["value_coding"], 4, 5)}, ValueError, "bits"),
    "a level": (lambda a: {"value_coding": replaced(a["value_coding"], 5, -128)}, ValueError, "-127"),
    "levels": (lambda a: {"value_coding": replaced(a["value_coding"], 6, -127)}, ValueError, "levels ascend"),
    "codes": (
        lambda a: {"key_planes": replaced(a["key_planes"], 0, a["key_planes"][0][..., :-1])},
        ValueError,
        "codes are",
    ),
    "codes of another type": (
        lambda a: {"key_planes": replaced(a["key_planes"], 0, a["key_planes"][0].view(torch.int8))},
        ValueError,
        "codes are",
    ),
    "scales": (
        lambda a: {"value_planes": replaced(a["value_planes"], 1, a["value_planes"][1].float())},
        ValueError,
        "scales are",
    ),
    "segments": (
        lambda a: {"value_planes": replaced(a["value_planes"], 1, a["value_planes"][1][:, :, :1])},
        ValueError,
        "scales are",
    ),
    "mean": (lambda a: {"key_frame": replaced(a["key_frame"], 0, torch.zeros(HEADS, DIM + 1))}, ValueError, "frame"),
    "order": (
        lambda a: {"key_frame": replaced(a["key_frame"], 1, torch.zeros(1, DIM, dtype=torch.int32))},
        ValueError,
        "frame",
    ),
    "signs": (lambda a: {"key_frame": replaced(a["key_frame"], 2, torch.ones(3))}, ValueError, "frame"),
}
# What only the compiled operators look at: what they would read as plain memory.
WORSE_CALLS = {
    "a number too many": (lambda a: {"key_coding": [*a["key_coding"], 0]}, ValueError, "too many"),
    "order beyond": (
        lambda a: {"value_frame": replaced(a["value_frame"], 1, a["value_frame"][1] + 1)},
        IndexError,
        "order",
    ),
    "order below": (
        lambda a: {"key_frame": replaced(a["key_frame"], 1, a["key_frame"][1] - 1)},
        IndexError,
        "order",
    ),
    "order of another type": (
        lambda a: {"key_frame": replaced(a["key_frame"], 1, a["key_frame"][1].long())},
        ValueError,
        "order",
    ),
    "deviations": (lambda a: {"key_frame": replaced(a["key_frame"], 3, torch.zeros(9))}, ValueError, "deviation"),
    "strided mean": (
        lambda a: {"key_frame": replaced(a["key_frame"], 0, torch.zeros(HEADS, 2 * DIM)[:, ::2])},
        ValueError,
        "mean",
    ),
    "strided codes": (
        lambda a: {"key_planes": replaced(a["key_planes"], 0, a["key_planes"][0].repeat(1, 1, 2)[..., ::2])},
        ValueError,
        "codes are",
    ),
    "strided scales": (
        lambda a: {"key_planes": replaced(a["key_planes"], 1, a["key_planes"][1].repeat(1, 1, 1, 2)[..., ::2])},
        ValueError,
        "scales are",
    ),
}


def check_refusal(name: str, change, error: type[Exception], message: str) -> None:
    arguments = attend_arguments(cache_of(name))
    attend = backend(name).attend_coded
    assert attend(**arguments).isfinite().all()
    with pytest.raises(error, match=message):
        attend(**(arguments | change(arguments)))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_calls_that_are_refused(name, change, error, message):
    check_refusal(name, change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_the_reference_refuses_too(change, error, message):
    arguments = attend_arguments(cache_of("reference"))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        backend("reference").attend_coded(**(arguments | change(arguments)))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("change", "error", "message"), WORSE_CALLS.values(), ids=WORSE_CALLS)
def test_memory_that_is_not_what_it_should_be_is_refused(name, change, error, message):
    check_refusal(name, change, error, message)


@pytest.mark.parametrize("name", COMPILED)
def test_streams_that_do_not_belong_together_are_refused(name):
    arguments, ops = attend_arguments(cache_of(name)), backend(name)
    other = attend_arguments(coded(ops, [random_sequence(LENGTH, 1, DIM, 1)], ("int8", "int8"), BLOCK))
    values = {key: other[key] for key in ("value_planes", "value_coding", "value_frame")}
    with pytest.raises(ValueError, match="the value planes"):
        ops.attend_coded(**(arguments | values))
    dense = paged(ops, [random_sequence(LENGTH, HEADS, DIM, 1)], torch.float32, BLOCK)
    plain = {"key_coding": [], "key_frame": [], "value_coding": [], "value_frame": []}
    with pytest.raises(ValueError, match="a stream that is coded"):
        ops.attend_coded(**(arguments | plain | {"key_planes": [dense.keys], "value_planes": [dense.values]}))


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sources": torch.tensor([0, 99])}, IndexError, "sources"),
        ({"sources": torch.tensor([-1, 0])}, IndexError, "sources"),
        ({"targets": torch.tensor([0, 99])}, IndexError, "targets"),
        ({"targets": torch.tensor([0])}, ValueError, "a target for each source"),
        ({"targets": int32([0, 1])}, ValueError, "int64"),
        ({"sources": torch.tensor([[0, 1]])}, ValueError, "sources must be"),
        ({"keys": False}, ValueError, "plane"),
        ({"open": torch.zeros(3, HEADS, 1, DIM, 16)}, ValueError, "the open plane holds"),
        ({"open": torch.zeros(3, HEADS, 2, DIM, 16, dtype=torch.float64)}, ValueError, "float32"),
        ({"planes": []}, ValueError, "two planes"),
    ],
)
def test_seals_that_are_refused(name, change, error, message):
    stream = cache_of(name).keys
    planes, flat, frame = stream.operands
    arguments = {
        "open": stream.open,
        "planes": planes,
        "coding": flat,
        "frame": frame,
        "keys": True,
        "sources": torch.tensor([0, 1]),
        "targets": torch.tensor([1, 0]),
    }
    before = planes[0].clone()
    with pytest.raises(error, match=message):
        backend(name).seal(**(arguments | change))
    assert torch.equal(planes[0], before)
    backend(name).seal(**arguments)


def sum_of_exponentials(cache, q: Tensor, k: Tensor, first: int) -> Tensor:
    """log2 of the sum of exp(scale * q.k) over what each row sees: [n, Hq] float64."""
    grouped = q.double().unflatten(1, (HEADS, -1))
    scores = torch.einsum("nhgd,thd->nhgt", grouped, k.double()) * cache.scale
    hidden = torch.arange(len(k)) > (first + torch.arange(len(q)))[:, None]
    return scores.masked_fill(hidden[:, None, None], -torch.inf).logsumexp(-1).flatten(1) * math.log2(math.e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_to_the_own_block_is_attend_with_its_sum(name, dtype):
    ops, (k, v) = backend(name), random_sequence(LENGTH, HEADS, DIM, 1)
    cache = paged(ops, [(k, v)], dtype, BLOCK)
    q = random_queries(40, HEADS * 3, DIM, 2).to(torch.bfloat16)
    rest = (cache.keys, cache.values, cache.tables, int32([0, 37]), int32([LENGTH]), cache.scale)
    own, lse = ops.attend_own(q, *rest)
    assert own.dtype == lse.dtype == torch.float32
    assert torch.equal(own, ops.attend(q.float(), *rest))
    assert torch.equal(lse[37:], torch.full((3, HEADS * 3), -torch.inf))
    expected = sum_of_exponentials(cache, q[:37], k.to(dtype), LENGTH - 37)
    assert (lse[:37] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", COMPILED)
def test_calls_without_queries(name):
    arguments, attend = attend_arguments(cache_of(name)), backend(name).attend_coded
    rows = {key: arguments[key][:0] for key in ("q", "own", "lse")}
    assert attend(**(arguments | rows | {"starts": int32([0, 0])})).shape == (0, HEADS * 2, DIM)
    nobody = {"starts": int32([0]), "lengths": int32([]), "tables": arguments["tables"][:0]}
    assert not attend(**(arguments | nobody)).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COMPILED)
def test_results_have_the_type_of_the_queries_and_are_rounded_once(name, dtype):
    arguments, attend = attend_arguments(cache_of(name)), backend(name).attend_coded
    q = arguments["q"].to(dtype)
    narrow, wide = (attend(**(arguments | {"q": x})) for x in (q, q.float()))
    assert narrow.dtype is dtype
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("name", COMPILED)
def test_queries_that_are_no_numbers_give_none_and_spare_the_others(name):
    cache, ops = cache_of(name, ("turbo4", "turbo4")), backend(name)
    q = random_queries(40, HEADS * 2, DIM, 3)
    clean = cache.attend(ops, [Piece(0, q, LENGTH)])
    for bad in (torch.nan, torch.inf):
        q[7, 1, 5] = bad
        spoiled = cache.attend(ops, [Piece(0, q, LENGTH)])
        assert not spoiled[7, 1].isfinite().any()
        others = torch.ones(q.shape[:2], dtype=torch.bool)
        others[7, 1] = False
        assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("kind", [("turbo4", "int8"), ("bf16", "turbo3"), ("int4", "fp32")], ids="-".join)
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_satisfy_pytorch(name, kind):
    ops, cache = backend(name), cache_of(name, kind)
    q = random_queries(5, HEADS * 2, DIM, 3)
    where = (cache.tables, int32([0, 4]), int32([LENGTH]))
    open_planes = [stream.open.nan_to_num() for stream in (cache.keys, cache.values)]
    torch.library.opcheck(ops.attend_own, (q, *open_planes, *where, cache.scale))
    planes = [
        ([plane.nan_to_num() if plane.is_floating_point() else plane for plane in planes], flat, frame)
        for planes, flat, frame in (cache.keys.operands, cache.values.operands)
    ]
    own = (torch.randn(q.shape), torch.randn(q.shape[:2]))
    torch.library.opcheck(ops.attend_coded, (q, *own, *planes[0], *planes[1], *where, BLOCK, cache.scale))
    ids = (torch.tensor([0, 1]), torch.tensor([2, 0]))
    for open_plane, stream, keys in zip(open_planes, planes, (True, False), strict=True):
        torch.library.opcheck(ops.seal, (open_plane, *stream, keys, *ids))
