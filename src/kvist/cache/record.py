"""A block as bytes: a header that says what it is, then its planes. docs/format.md has the table.

Whoever reads one knows beforehand what it must be: its key, its namespace, its size. Nothing is read from a record but
what is compared with that, so no number in it decides how much is allocated or where anything is written."""

import hashlib
import struct
from dataclasses import dataclass
from enum import StrEnum

from kvist.cache.keys import block_key, pack_tokens, unpack_tokens

MAGIC = b"\x89KVIST\r\n"
VERSION = 1
# magic, version, tokens, bytes of the planes, namespace, parent's key, digest of the planes
_HEAD = struct.Struct("<8sIIQ32s32s32s")
_DIGEST = 32  # of the header, behind the tokens


class Loss(StrEnum):
    """Why KV that was there once cannot be had."""

    EVICTED = "evicted"  # its room was needed
    EXPIRED = "expired"  # it was not used for as long as may be
    TRUNCATED = "truncated"  # shorter, or longer, than it was written
    CORRUPT = "corrupt"  # its bytes are not those that were written
    VERSION = "version"  # written in another version of the format
    FOREIGN = "foreign"  # a record of something else than its name says
    UNREADABLE = "unreadable"  # the tier failed, or took too long
    UNWRITTEN = "unwritten"  # it had to go before it could be written, or writing failed
    NAMESPACE = "namespace"  # made by other weights, codecs, operators or the like: of no use here
    UNKEPT = "unkept"  # it was asked for that it is not written


class BadRecord(Exception):
    """Bytes that are not the record which was asked for."""

    def __init__(self, loss: Loss, message: str) -> None:
        super().__init__(message)
        self.loss = loss


def block_name(namespace: bytes, key: bytes) -> str:
    """What tiers call the block of that key: two digests in hexadecimal, and so safe in a path."""
    return f"{namespace.hex()[:32]}/{key.hex()}"


@dataclass(frozen=True)
class BlockId:
    """Which block: the key of the root of its sequence, of the block before it, and its tokens; `key` is its own."""

    namespace: bytes
    parent: bytes
    tokens: tuple[int, ...]
    key: bytes

    @staticmethod
    def after(namespace: bytes, parent: bytes, tokens: tuple[int, ...]) -> "BlockId":
        return BlockId(namespace, parent, tokens, block_key(parent, tokens))

    @property
    def name(self) -> str:
        """What tiers call it."""
        return block_name(self.namespace, self.key)


def record_bytes(tokens: int, payload: int) -> int:
    """How long the record of a block is."""
    return _HEAD.size + 4 * tokens + _DIGEST + payload


def header(block: BlockId, payload: bytes | bytearray | memoryview) -> bytes:
    """What stands before `payload` in the record of `block`."""
    digest = hashlib.sha256(payload).digest()
    size = memoryview(payload).nbytes
    head = _HEAD.pack(MAGIC, VERSION, len(block.tokens), size, block.namespace, block.parent, digest)
    head += pack_tokens(block.tokens)
    return head + hashlib.sha256(head).digest()


def read_payload(record: bytes | bytearray | memoryview, block: BlockId, payload: int) -> memoryview:
    """The planes in the record of `block`, `payload` bytes, without a copy. Raises `BadRecord`."""
    view = memoryview(record)
    start = check_header(view, block, payload)
    if view.nbytes != start + payload:
        raise BadRecord(Loss.TRUNCATED, f"it has {view.nbytes:,} bytes where {start + payload:,} belong")
    found = view[start:]
    if hashlib.sha256(found).digest() != _HEAD.unpack_from(view)[6]:
        raise BadRecord(Loss.CORRUPT, "its planes do not have the digest that its header gives")
    return found


def check_header(view: memoryview, block: BlockId, payload: int) -> int:
    """Where the planes begin in a record of `block`. Raises `BadRecord` unless the header is exactly that of it."""
    start = record_bytes(len(block.tokens), 0)
    if view.nbytes < start:
        raise BadRecord(Loss.TRUNCATED, f"it has {view.nbytes:,} bytes, fewer than its header")
    magic, version, count, size, namespace, parent, _ = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise BadRecord(Loss.CORRUPT, "it does not begin as a block does")
    if version != VERSION:
        raise BadRecord(Loss.VERSION, f"it has version {version} of the format, and {VERSION} is read here")
    if hashlib.sha256(view[: start - _DIGEST]).digest() != view[start - _DIGEST : start]:
        raise BadRecord(Loss.CORRUPT, "its header does not have the digest that stands behind it")
    if namespace != block.namespace or parent != block.parent:
        raise BadRecord(Loss.FOREIGN, "it belongs to another namespace, or behind another block")
    if count != len(block.tokens) or unpack_tokens(view[_HEAD.size : start - _DIGEST]) != block.tokens:
        raise BadRecord(Loss.FOREIGN, "it holds other tokens")
    if size != payload:
        raise BadRecord(Loss.FOREIGN, f"its planes take {size:,} bytes where {payload:,} belong")
    return start
