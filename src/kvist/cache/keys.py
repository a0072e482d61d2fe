"""What a block is called outside of memory: a digest of everything that its bytes depend on.

The key of a root is a digest of the namespace: what made the KV, and whose it is. The key of a block is a digest of its
parent's key and its own tokens, so it stands for the whole sequence up to its end, in that namespace and no other."""

import hashlib
import struct
from collections.abc import Sequence

_ROOT = b"kvist namespace 1\0"
_BLOCK = b"kvist block 1\0"


def root_key(identity: bytes, tenant: str) -> bytes:
    """The namespace of `tenant` under an identity: 32 bytes. Its sequences begin there."""
    return hashlib.sha256(_ROOT + len(identity).to_bytes(8, "little") + identity + tenant.encode()).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the block that holds `tokens` behind the block (or root) of key `parent`: 32 bytes."""
    return hashlib.sha256(_BLOCK + parent + pack_tokens(tokens)).digest()


def chain_key(root: bytes, tokens: Sequence[int], size: int) -> bytes:
    """The key of the last whole block of `tokens` behind `root`: of the root itself where there is none."""
    key = root
    for start in range(0, len(tokens) - size + 1, size):
        key = block_key(key, tokens[start : start + size])
    return key


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as they are hashed and stored: 32 bits each, little endian."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def unpack_tokens(data: bytes | memoryview) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    return struct.unpack(f"<{len(data) // 4}I", data)
