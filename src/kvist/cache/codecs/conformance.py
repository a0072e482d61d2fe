"""What a codec of somebody else has to be before it is used: the members of the protocol, and a block there and back.

Quick, as it is done in every process that uses one. `kvist.testing.check_codec` is what its author runs."""

import re

import torch

from kvist.base.errors import ConfigError
from kvist.cache.codecs.base import Codec, Plane
from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.codecs.dense import DenseCodec
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Frame

_NAME = re.compile(r"[\w.-]{1,64}")
_RESERVED = ("auto",)  # what stands for something else where a codec's name may stand
_FLAGS, _METHODS = ("in_place", "centred", "ordered"), ("planes", "coding", "encode", "decode")
_BLOCK = 64


def refusal(name: str, codec: Codec) -> str | None:
    """Why this is no codec of that name, or None where it is one."""
    for flag in _FLAGS:
        if not isinstance(getattr(codec, flag, None), bool):
            return f"its {flag} is neither True nor False"
    for method in _METHODS:
        if not callable(getattr(codec, method, None)):
            return f"it has no method {method}"
    if not isinstance(getattr(codec, "name", None), str) or codec.name != name:
        return "its own name is another one"
    if not _NAME.fullmatch(name) or name in _RESERVED:
        return "a name has letters, digits, '_', '.' and '-', and 'auto' stands for something else"
    if codec.in_place and not isinstance(codec, DenseCodec):
        return "in_place is what a DenseCodec is: the operators write its plane themselves"
    for role in Role:
        reason = block_refusal(codec, Stream("k", role, 2, 64), _BLOCK)
        if reason is not None:
            return f"a block of {_BLOCK} {role} in heads of 64: {reason}"
    return None


def block_refusal(codec: Codec, stream: Stream, block_size: int) -> str | None:
    """What is wrong with a block of random vectors that is coded and decoded; None too where it cannot hold them."""
    try:
        planes = codec.planes(stream, block_size)
    except ConfigError:
        return None
    if not isinstance(planes, tuple) or not planes or not all(isinstance(plane, Plane) for plane in planes):
        return "planes gives something else than a tuple of Planes"
    x = torch.randn(block_size, stream.heads, stream.dim, generator=torch.Generator().manual_seed(0))
    frame = Frame.plain(stream.heads, stream.dim)
    encoded = codec.encode(x, stream, frame)
    described = [(tuple(plane.shape), plane.dtype) for plane in planes]
    if (found := [(tuple(plane.shape), plane.dtype) for plane in encoded]) != described:
        return f"encode gives planes of {found} where planes says {described}"
    if not all(plane.is_contiguous() for plane in encoded):
        return "encode gives a plane that is not contiguous"
    decoded = codec.decode(encoded, stream, frame)
    if (decoded.shape, decoded.dtype) != (x.shape, torch.float32):
        return f"decode gives {decoded.dtype} of {tuple(decoded.shape)} where float32 of {tuple(x.shape)} was coded"
    if not bool(decoded.isfinite().all()):
        return "decode gives numbers that are not finite"
    if (coding := codec.coding(stream)) is None:
        return None
    # The operators read and write these planes by the coding alone, whatever `encode` and `decode` say.
    by_kernels = CodedCodec(codec.name, lambda of: coding)
    if coding.dim != stream.dim or described != [(p.shape, p.dtype) for p in by_kernels.planes(stream, block_size)]:
        return "its planes are not those of its coding; a CodedCodec has them"
    same = zip(encoded, by_kernels.encode(x, stream, frame), strict=True)
    if not all(torch.equal(ours, theirs) for ours, theirs in same):
        return "encode gives other bytes than its coding, which the operators go by"
    if not torch.equal(decoded, by_kernels.decode(encoded, stream, frame)):
        return "decode gives other numbers than its coding, which the operators go by"
    return None
