"""A context as one file, for another machine that has the same model. docs/format.md has the table.

The whole file is read and checked before anything of it is used, record by record, in bounded memory; then its blocks
are written under this machine's namespace, and last its description. Until then nothing finds them."""

import hashlib
import json
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file
from kvist.cache.disk import DiskTier
from kvist.cache.keys import root_key
from kvist.cache.layout import Layout
from kvist.cache.record import BadRecord, header, read_payload, record_bytes
from kvist.cache.tier import TierError
from kvist.service.contexts import Context, Contexts, blocks_of, check_name, check_room, finish, read_context
from kvist.service.identity import Identity

MAGIC = b"\x89KVISTC\n"
VERSION = 1
_HEAD = struct.Struct("<8sII")  # magic, version, bytes of the description
_MOST_DESCRIPTION = 256 << 20
_DIGEST = 32
# What may differ where the user says so: the same model, whose last bits another machine rounds otherwise.
_ARITHMETIC = {"arithmetic", "operators"}

Watch = Callable[[int, int], None]  # blocks that are done, of how many


def export_context(context: Context, disk: DiskTier, path: Path, watch: Watch = lambda done, total: None) -> None:
    """Write a context with all its blocks to `path`: whole or not at all. Raises `KvistError` when a block is not there
    any more, or is damaged."""
    description = json.dumps(context.to_json()).encode()
    blocks, size = context.blocks, record_bytes(context.block_size, context.block_bytes)
    with atomic_file(path) as target, open(target, "wb") as file:
        digest = hashlib.sha256()

        def write(data: bytes | bytearray | memoryview) -> None:
            digest.update(data)
            file.write(data)

        write(_HEAD.pack(MAGIC, VERSION, len(description)))
        write(description)
        for done, block in enumerate(blocks):
            watch(done, len(blocks))
            try:
                record = disk.get(block.name, size)
                if record is None:
                    raise KvistError(f"a block of {context.name} is not on disk any more; make the context again")
                read_payload(record, block, context.block_bytes)
            except (BadRecord, TierError) as error:
                raise KvistError(f"a block of {context.name} cannot be used: {error}; make it again") from None
            write(memoryview(record))
        file.write(digest.digest())


def import_context(
    path: Path,
    name: str | None,
    contexts: Contexts,
    disk: DiskTier,
    identity: Identity,
    layout: Layout,
    most_tokens: int,
    *,
    other_arithmetic: bool = False,
    watch: Watch = lambda done, total: None,
) -> Context:
    """Take over a context that another machine has exported. `identity`, `layout`: of the model here, whose context
    holds `most_tokens`. Raises `KvistError`, having changed nothing that anybody finds, for a file that is none, is
    damaged, or belongs to another model."""
    with _opened(path) as file:
        found, start = _read_description(file, path)
        differs = found.identity.differences(identity)
        serious = [field for field in differs if field not in _ARITHMETIC]
        if serious:
            raise KvistError(f"{path} was made by another model than {identity.model}: {', '.join(serious)} differ")
        if differs and not other_arithmetic:
            raise KvistError(
                f"{path} was made by the same model, but where sums are rounded otherwise ({', '.join(differs)}): "
                "answers may differ from those computed here in rare words; --other-arithmetic takes it all the same"
            )
        if (found.block_size, found.block_bytes) != (layout.block_size, layout.block_bytes):
            raise KvistError(f"{path} is damaged: its blocks are not those of its layout")
        local = replace(
            found,
            name=check_name(name or found.name),
            tenant=contexts.tenant,
            identity=identity,
            created=time.time(),
            elsewhere=bool(differs) or found.elsewhere,
        )
        check_room(len(local.tokens), most_tokens, disk, local.block_size, local.block_bytes)
        size = record_bytes(found.block_size, found.block_bytes)
        count = len(found.tokens) // found.block_size
        _check_whole(file, path, start + count * size, watch, count)
        file.seek(start)
        theirs = blocks_of(found.tokens, root_key(found.identity.digest, found.tenant), found.block_size)
        for done, (their, our) in enumerate(zip(theirs, local.blocks, strict=True)):
            watch(count + done, 2 * count)
            try:
                payload = read_payload(file.read(size), their, found.block_bytes)
                if not disk.put(our.name, (header(our, payload), payload), time.time()):
                    raise KvistError("there is no room for it on disk; give more with --cache-disk")
            except (BadRecord, TierError) as error:
                raise KvistError(f"{path}, block {done + 1}: {error}") from None
    finish(local, contexts, disk)
    return local


def _opened(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        file = open(descriptor, "rb")  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise KvistError(f"{path} is no file")
        return file
    except OSError as error:
        raise KvistError(f"cannot read {path}: {error.strerror or error}") from None


def _read_description(file: BinaryIO, path: Path) -> tuple[Context, int]:
    """The description, and where the blocks begin."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:8] != MAGIC:
        raise KvistError(f"{path} is no context that Kvist has exported")
    _, version, length = _HEAD.unpack(head)
    if version != VERSION:
        raise KvistError(f"{path} has version {version} of the format, and {VERSION} is read here")
    if length > min(_MOST_DESCRIPTION, os.fstat(file.fileno()).st_size):
        raise KvistError(f"{path} is damaged: its description cannot be so long")
    try:
        return read_context(json.loads(file.read(length))), _HEAD.size + length
    except (KvistError, ValueError, RecursionError) as error:
        raise KvistError(f"{path} is damaged: {error}") from None


def _check_whole(file: BinaryIO, path: Path, end: int, watch: Watch, count: int) -> None:
    """Raises `KvistError` unless the file has exactly the length and the digest that it should have."""
    length = os.fstat(file.fileno()).st_size
    if length != end + _DIGEST:
        raise KvistError(f"{path} is damaged: it has {length:,} bytes where {end + _DIGEST:,} belong")
    digest, file_position = hashlib.sha256(), 0
    file.seek(0)
    for piece in _pieces(file, end):
        digest.update(piece)
        file_position += len(piece)
        watch(count * file_position // max(end, 1), 2 * count)
    if file.read(_DIGEST) != digest.digest():
        raise KvistError(f"{path} is damaged: its digest is another one")


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = file.read(min(length, 1 << 22))
        if not piece:
            return
        length -= len(piece)
        yield piece
