"""Every registered codec: its bytes, its error, and that nothing of a block depends on anything else."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs import CODECS, Codec, bits_per_value
from kvist.cache.codecs.outlier import outliers
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Coding, Frame, Rule
from kvist.testing.codecs import CHECKS, HEADS

# Bits per value in heads of 64 and of 128; the mean squared error, relative, of normal values in heads of 128.
EXPECTED = {
    "fp32": (32, 32, 0),
    "bf16": (16, 16, 2.8e-6),
    "fp16": (16, 16, 4.3e-8),
    "int8": (8.25, 8.125, 4.2e-5),
    "int4": (4.5, 4.5, 0.0073),
    "int4-rot": (4.5, 4.5, 0.0073),
    "turbo4": (4.25, 4.125, 0.0079),
    "turbo3.5": (3.75, 3.5, 0.025),
    "turbo3": (3.25, 3.125, 0.032),
    "turbo2.5": (2.75, 2.5, 0.1),
    "turbo2": (2.25, 2.125, 0.12),
    "paper-mse4": (4.25, 4.125, 0.0093),
    "paper-mse3": (3.25, 3.125, 0.034),
    "paper-mse2": (2.25, 2.125, 0.116),
    "paper-prod4": (4.5, 4.25, 0.053),
    "paper-prod3": (3.5, 3.25, 0.182),
    "paper-prod2": (2.5, 2.25, 0.567),
}

each_codec = pytest.mark.parametrize("codec", [pytest.param(codec, id=name) for name, codec in CODECS.items()])
each_role = pytest.mark.parametrize("role", list(Role))


def stream(dim: int = 64, heads: int = 2, role: Role = Role.KEYS) -> Stream:
    return Stream("k", role, heads, dim)


def block(dim: int = 64, heads: int = 2, tokens: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: Codec, x: Tensor, of: Stream, frame: Frame | None = None) -> Tensor:
    frame = frame or Frame.plain(of.heads, of.dim)
    return codec.decode(codec.encode(x, of, frame), of, frame)


def error(x: Tensor, decoded: Tensor) -> float:
    return float(((x - decoded) ** 2).sum() / (x**2).sum())


@pytest.mark.parametrize("name", list(EXPECTED))
def test_bits_per_value_to_the_bit(name: str) -> None:
    at_64, at_128, _ = EXPECTED[name]
    for role in Role:
        assert bits_per_value(CODECS[name], stream(64, role=role), 64) == at_64
        assert bits_per_value(CODECS[name], stream(128, heads=5, role=role), 16) == at_128


@pytest.mark.parametrize("name", list(EXPECTED))
def test_distortion_of_normal_values(name: str) -> None:
    expected = EXPECTED[name][2]
    for role in Role:
        x = block(128, heads=4)
        found = error(x, round_trip(CODECS[name], x, stream(128, 4, role)))
        assert found == pytest.approx(expected, rel=0.16 if "2" in name else 0.08)


@each_codec
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conforms(codec: Codec, check: Callable[[Codec], None]) -> None:
    """What authors of others' codecs run on theirs."""
    check(codec)


@each_codec
@each_role
def test_zeros_and_powers_of_two(codec: Codec, role: Role) -> None:
    x, of = block(), stream(role=role)
    x[3] = 0
    once = round_trip(codec, x, of)
    assert not once[3].any()
    assert torch.equal(round_trip(codec, x * 8, of), once * 8)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if not codec.in_place])
def test_heads_and_blocks_that_cannot_be_coded(name: str) -> None:
    for dim, block_size in ((24, 64), (16, 64), (528, 64), (64, 512), (64, 24)):
        with pytest.raises(ConfigError, match=rf"{name} cannot hold the stream 'k': .*, not (\d+)$"):
            CODECS[name].planes(stream(dim), block_size)


def coding(name: str, dim: int, role: Role = Role.KEYS) -> Coding:
    found = CODECS[name].coding(stream(dim, role=role))
    assert found is not None
    return found


def test_int4_is_ggmls_q4_0() -> None:
    """Written out as ggml's quantize_row_q4_0: whole numbers x / d + 8.5 cut off, d = max / -8 in half precision."""
    x = block(96) * 3
    decoded = round_trip(CODECS["int4"], x, stream(96))
    groups = x.unflatten(-1, (3, 32))
    top = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    codes = (groups * (1 / (top / -8)) + 8.5).floor().clamp(0, 15)
    expected = (codes - 8) * (top / -8).half().float()
    assert float((decoded != expected.flatten(-2)).float().mean()) < 1e-4  # 1 / (top / -8) and -8 / top round apart
    assert torch.allclose(decoded, expected.flatten(-2), atol=float(top.abs().max()) / 7)


def test_int8_takes_the_nearest_of_its_steps() -> None:
    x = block()
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((round_trip(CODECS["int8"], x, stream()) - x).abs() < step * 0.57).all())


def test_rotations_and_groups() -> None:
    assert coding("int4", 80).rotation == ()
    assert [s.dims for s in coding("int4", 80).segments] == [32, 32, 16]
    assert coding("int4-rot", 128).rotation == (128,)
    assert coding("int4-rot", 192).rotation == (64, 64, 64)
    assert coding("int4-rot", 80).rotation == (64, 16)
    assert coding("turbo3", 80).rotation == (64, 16)
    assert [(s.dims, s.bits) for s in coding("turbo2.5", 128).segments] == [(32, 3), (96, 2)]
    assert coding("turbo3.5", 128).rotation == (32, 64, 32)
    assert [outliers(dim) for dim in HEADS] == [16, 16, 16, 16, 32, 32, 32, 48, 48, 64, 128]


@pytest.mark.parametrize("name", ["turbo4", "turbo3.5", "turbo3", "turbo2.5", "turbo2"])
def test_scales_do_what_their_rules_say(name: str) -> None:
    x = block(128).double()
    for role, rule in ((Role.KEYS, Rule.UNBIASED), (Role.VALUES, Rule.LEAST_SQUARES)):
        assert coding(name, 128, role).rule is rule
        decoded = round_trip(CODECS[name], x.float(), stream(128, role=role)).double()
        if rule is Rule.UNBIASED:
            assert (x * decoded).sum(-1) == pytest.approx((x * x).sum(-1), rel=1e-3)
        else:  # what is lost is orthogonal to what is kept
            assert (x * decoded).sum(-1) == pytest.approx((decoded * decoded).sum(-1), rel=1e-3)


def test_outlier_channels_deserve_their_bit() -> None:
    x = block(128)
    loud = torch.randperm(128, generator=torch.Generator().manual_seed(4))[:32]
    x[:, :, loud] *= 10
    order = torch.cat((loud, torch.tensor([i for i in range(128) if i not in set(loud.tolist())])))
    ordered = replace(Frame.plain(2, 128), order=order.repeat(2, 1).int())
    codec = CODECS["turbo2.5"]
    known, unknown = (error(x, round_trip(codec, x, stream(128), frame)) for frame in (ordered, Frame.plain(2, 128)))
    assert known < 0.45 * unknown
    assert known < 0.45 * error(x, round_trip(CODECS["turbo2"], x, stream(128)))
