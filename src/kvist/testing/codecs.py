"""What every codec does: its bytes, its error, and that nothing of a block depends on anything else."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs import Codec, bits_per_value
from kvist.cache.codecs.conformance import block_refusal, refusal
from kvist.cache.layout import plan_layout
from kvist.cache.spec import Role, Stream
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.ops.coding import Frame
from kvist.service.loaded import Loaded, select_backend
from kvist.testing.claims import claiming, require
from kvist.testing.exactness import verify

HEADS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)  # sizes that models have
BLOCKS = (16, 64)  # tokens
FLIPS = 24  # bits of each plane
Check = Callable[..., None]


def check_codec(codec: Codec, *, error: float | None = None, idle_bits: bool = False) -> None:
    """All of it, which takes a second or two. `error`: the most that a block of normal values may lose, mean squared
    and relative; by default what theory allows for the codec's bits. `idle_bits`: some bits of its planes mean nothing,
    as padding. Heads that it cannot hold, which `planes` refuses with a `ConfigError`, are left out."""
    limited, name = (check_error, check_frame), getattr(codec, "name", "the codec")
    for check in CHECKS:
        with claiming(name, check.__doc__):
            if check in limited:
                check(codec, error)
            elif check is not check_bits or not idle_bits:
                check(codec)


def check_members(codec: Codec) -> None:
    """It is what `kvist.register_codec` takes."""
    if reason := refusal(getattr(codec, "name", ""), codec):
        raise AssertionError(f"the codec would not be registered: {reason}")


def check_planes(codec: Codec) -> None:
    """Shapes, types and names of its planes are as it says: in heads of every size and blocks of several."""
    for of, block_size in _held(codec):
        where = _where(codec, of, block_size)
        if reason := block_refusal(codec, of, block_size):
            raise AssertionError(f"{where}: {reason}")
        names = [plane.name for plane in codec.planes(of, block_size)]
        require(len(set(names)) == len(names), f"{where}: two planes have one name, of {', '.join(names)}")
        require(all(n.split(".")[0] == "k" for n in names), f"{where}: a plane is called STREAM or STREAM.PART")


def check_error(codec: Codec, error: float | None = None) -> None:
    """A block of normal values comes back with no more error than its bits allow, or than `error`."""
    for of, block_size in _held(codec):
        x = _block(of.dim, of.heads, block_size)
        _within(codec, of, x, _round_trip(codec, x, of), error, "normal values")


def check_determinism(codec: Codec) -> None:
    """The same block has the same bytes every time: whatever was coded in between; and no tensor is changed."""
    for of in _streams(codec, heads=2):
        x, frame, where = _block(of.dim, 2), Frame.plain(2, of.dim), _where(codec, of)
        given = x.clone()
        first = codec.encode(x, of, frame)
        kept = [plane.clone() for plane in first]
        _round_trip(codec, 3 * _block(of.dim, 2, seed=9), of)
        second = codec.encode(x, of, frame)
        require(_same(kept, second), f"{where}: the same block comes to other bytes the second time")
        once, twice = codec.decode(first, of, frame), codec.decode(second, of, frame)
        require(torch.equal(once, twice), f"{where}: the same bytes come to other numbers the second time")
        require(torch.equal(x, given), f"{where}: encode changes the block that it is given")
        require(_same(first, kept), f"{where}: decode, or a later encode, changes planes that were given away")


def check_independence(codec: Codec) -> None:
    """A vector depends on itself alone: not on other heads, other tokens, its place or the size of its block."""
    for of in _streams(codec, heads=3):
        x, where = _block(of.dim, 3), _where(codec, of)
        whole = _round_trip(codec, x, of)
        alone = replace(of, heads=1)
        for head in range(3):
            found = _round_trip(codec, x[:, head : head + 1], alone)[:, 0]
            require(torch.equal(found, whole[:, head]), f"{where}: a head comes back otherwise beside others")
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        moved = torch.equal(_round_trip(codec, x[order], of), whole[order])
        require(moved, f"{where}: a token comes back otherwise in another place of its block")
        part = torch.equal(_round_trip(codec, x[16:32], of), whole[16:32])
        require(part, f"{where}: a token comes back otherwise in a block of 16")


def check_zeros(codec: Codec) -> None:
    """A vector of zeros comes back as zeros, and one of large or small numbers as numbers."""
    for of in _streams(codec, heads=2):
        x, where = _block(of.dim, 2), _where(codec, of)
        x[3] = 0
        require(not bool(_round_trip(codec, x, of)[3].any()), f"{where}: zeros do not come back as zeros")
        for scale in (1e-3, 1e3):
            finite = bool(_round_trip(codec, x * scale, of).isfinite().all())
            require(finite, f"{where}: values of about {scale:g} come back as numbers that are not finite")


def check_frame(codec: Codec, error: float | None = None) -> None:
    """The frame's mean is taken off where keys are centred, and its order of channels may be any."""
    for of in _streams(codec, heads=2):
        generator = torch.Generator().manual_seed(3)
        order = torch.stack([torch.randperm(of.dim, generator=generator) for _ in range(2)]).int()
        mean = torch.randn(2, of.dim, generator=generator) * 3 * codec.centred
        frame, x = replace(Frame.plain(2, of.dim), mean=mean, order=order), _block(of.dim, 2)
        _within(codec, of, x, _round_trip(codec, x + mean, of, frame), error, "values in a frame of their own")


def check_bits(codec: Codec) -> None:
    """A bit flipped anywhere is seen in what is decoded, and in one head alone: none is idle."""
    for of in _streams(codec, heads=2, dims=(32, 64, 128, 256)):
        frame, where = Frame.plain(2, of.dim), _where(codec, of, 16)
        planes = codec.encode(_block(of.dim, 2, 16), of, frame)
        clean, generator = codec.decode(planes, of, frame), torch.Generator().manual_seed(2)
        for index in range(len(planes)):
            for _ in range(FLIPS):
                damaged = [p.clone() for p in planes]
                flat = damaged[index].view(torch.uint8).view(-1)
                place, bit = (int(torch.randint(n, (1,), generator=generator)) for n in (len(flat), 8))
                flat[place] ^= 1 << bit
                changed = (codec.decode(tuple(damaged), of, frame) != clean).flatten(2).any(-1)
                what = f"{where}: bit {bit} of byte {place} of plane {index}"
                require(bool(changed.any()), f"{what} changes nothing: idle_bits=True says that some do not")
                require(int(changed.any(0).sum()) == 1, f"{what} changes more than one head")


def check_exactness(codec: Codec) -> None:
    """Over a cache of it, a random model gives the same bits however its tokens are chunked, batched, shared, taken
    back: `kvist verify`, small."""
    of = next(_streams(codec), None)
    if of is None:
        return
    config = ModelConfig(
        family="llama",
        vocab_size=61,
        hidden_size=48,
        intermediate_size=72,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=of.dim,
        max_positions=256,
        norm_eps=1e-5,
        activation=Activation.SILU,
        rope=Rope(10_000.0),
    )
    backend = select_backend(config, torch.float32)
    model = randomize(build(config, backend, torch.float32), seed=3, std=0.2)
    loaded = Loaded("random", config, model, plan_layout(config.layer_specs(), codec), backend, Path())
    verify(loaded, codec.name, length=136, steps=2, trials=1)


CHECKS: tuple[Check, ...] = (
    *(check_members, check_planes, check_error, check_determinism, check_independence),
    *(check_zeros, check_frame, check_bits, check_exactness),
)


def loosest(codec: Codec, of: Stream) -> float:
    """The upper bound of arXiv 2504.19874, theorem 2, for the bits of a code, scales not counted; none is held to less
    than eight bits' error."""
    return 17.1 * 4.0 ** -min(8, math.ceil(bits_per_value(codec, of, 64)) - 1)


def _held(codec: Codec) -> list[tuple[Stream, int]]:
    """The streams, and blocks of tokens, that it holds of those that models have. There is one at least."""
    found = []
    for role, dim, block_size in ((role, dim, size) for role in Role for dim in HEADS for size in BLOCKS):
        with suppress(ConfigError):
            codec.planes(_stream(dim, 3, role), block_size)
            found.append((_stream(dim, 3, role), block_size))
    require(bool(found), f"{codec.name} holds heads of none of {', '.join(map(str, HEADS))}")
    return found


def _streams(codec: Codec, heads: int = 3, dims: tuple[int, ...] = (64, 128, 32, 256)) -> Iterator[Stream]:
    """Keys and values in heads of the first of these sizes that it holds."""
    for dim in dims:
        try:
            found = [_stream(dim, heads, role) for role in Role]
            for of, size in ((of, size) for of in found for size in BLOCKS):
                codec.planes(of, size)
        except ConfigError:
            continue
        yield from found
        return


def _stream(dim: int, heads: int, role: Role) -> Stream:
    return Stream("k", role, heads, dim)


def _block(dim: int, heads: int, tokens: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


def _round_trip(codec: Codec, x: Tensor, of: Stream, frame: Frame | None = None) -> Tensor:
    frame = frame or Frame.plain(of.heads, of.dim)
    return codec.decode(codec.encode(x, of, frame), of, frame)


def _within(codec: Codec, of: Stream, x: Tensor, decoded: Tensor, error: float | None, what: str) -> None:
    most = loosest(codec, of) if error is None else error
    found = float(((x - decoded) ** 2).sum() / (x**2).sum())
    require(found <= most, f"{_where(codec, of)}: {what} lose {found:.3g} of their square; {most:.3g} is the most")


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def _where(codec: Codec, of: Stream, block_size: int = 64) -> str:
    return f"{codec.name}, {of.role} in heads of {of.dim}, a block of {block_size}"
