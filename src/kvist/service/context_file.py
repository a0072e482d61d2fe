"""A context as one file, for another machine that has the same model. docs/format.md has the table.

The whole file is read and checked before anything of it is used, record by record, in bounded memory; then its blocks
are written under this machine's namespace, and last its description. On an error they are removed again."""

import hashlib
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
from kvist.base.units import format_bytes
from kvist.cache.disk import DiskTier
from kvist.cache.layout import Layout
from kvist.cache.record import BadRecord, BlockId, header, read_payload, record_bytes
from kvist.cache.tier import TierError
from kvist.service.contexts import Context, Contexts, check_name, check_room, finish, read_context
from kvist.service.identity import Identity

MAGIC = b"\x89KVISTC\n"
VERSION = 1
_HEAD = struct.Struct("<8sII")  # magic, version, bytes of the description
_MOST_DESCRIPTION = 64 << 20
_DESCRIBED = 1 << 16, 256  # bytes of a description: of any, and more for each token that a model's context holds
_DIGEST = 32
# What may differ where the user says so: the same model, whose last bits another machine rounds otherwise.
_ARITHMETIC = {"arithmetic", "operators"}

Watch = Callable[[int, int], None]  # blocks that are done, of how many


def export_context(context: Context, disk: DiskTier, path: Path, watch: Watch = lambda done, total: None) -> None:
    """Write a context with all its blocks to `path`: whole or not at all. Raises `KvistError` when a block is not there
    any more, or is damaged."""
    description = context.to_bytes()
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
    holds `most_tokens`. Raises `KvistError`, and leaves nothing behind, for a file that is none, is damaged, or belongs
    to another model."""
    with _opened(path) as file:
        found, start = _read_description(file, path, most_tokens)
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
        check_room(local, most_tokens, disk)
        size = record_bytes(found.block_size, found.block_bytes)
        count = len(found.tokens) // found.block_size
        _check_whole(file, path, start + count * size, watch, count)
        file.seek(start)
        theirs, written = found.blocks, list[str]()
        try:
            for done, (their, our) in enumerate(zip(theirs, local.blocks, strict=True)):
                watch(count + done, 2 * count)
                try:
                    payload = read_payload(file.read(size), their, found.block_bytes)
                    _put(our, payload, disk, written, replaces=not local.elsewhere)
                except (BadRecord, TierError) as error:
                    raise KvistError(f"{path}, block {done + 1}: {error}") from None
            finish(local, contexts, disk)
        except BaseException:  # Ctrl-C, too
            for block in written:
                disk.remove(block)
            raise
    return local


def _put(block: BlockId, payload: memoryview, disk: DiskTier, written: list[str], *, replaces: bool) -> None:
    """Write a block, and note it in `written` unless it was there. One that was, and may be damaged, is written anew;
    without `replaces` it stays, as one that was computed here does beside one from elsewhere."""
    known = disk.contains(block.name)
    if known and not replaces:
        return
    if not disk.put(block.name, (header(block, payload), payload), time.time()):
        raise KvistError("there is no room for it on disk; give more with --cache-disk")
    if not known:
        written.append(block.name)


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


def _read_description(file: BinaryIO, path: Path, most_tokens: int) -> tuple[Context, int]:
    """The description, and where the blocks begin."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size or head[:8] != MAGIC:
        raise KvistError(f"{path} is no context that Kvist has exported")
    _, version, length = _HEAD.unpack(head)
    if version != VERSION:
        raise KvistError(f"{path} has version {version} of the format, and {VERSION} is read here")
    fixed, each = _DESCRIBED
    if length > min(_MOST_DESCRIPTION, fixed + each * most_tokens, os.fstat(file.fileno()).st_size):
        raise KvistError(f"{path} is damaged, or for a larger model: its description takes {format_bytes(length)}")
    try:
        return read_context(file.read(length)), _HEAD.size + length
    except KvistError as error:
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
