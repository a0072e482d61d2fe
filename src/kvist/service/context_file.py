"""A context as one file, for another machine that has the same model. docs/format.md has the table.

The whole file is read and checked before anything of it is used, record by record, in bounded memory; then blocks of it
are computed again, all of it is written under this machine's namespace, and last its description. On an error it is
removed again.

What the file says of itself proves nothing of its KV: whoever makes one can write any. So a context whose blocks were
not all computed again, nor is from somebody trusted, lies in a namespace of its own, where prompts that name it read it
and no others do."""

import hashlib
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file
from kvist.base.units import format_bytes
from kvist.cache.disk import DiskTier
from kvist.cache.record import BadRecord, BlockId, header, read_payload, record_bytes
from kvist.cache.tier import TierError
from kvist.service.context_check import Check, check_blocks, drawn
from kvist.service.contexts import Context, Contexts, check_name, check_room, finish, read_context
from kvist.service.identity import Identity
from kvist.service.loaded import Loaded

MAGIC = b"\x89KVISTC\n"
VERSION = 2
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
    with atomic_file(path, 0o600) as target, open(target, "wb") as file:
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
    loaded: Loaded,
    *,
    check: Check = Check.SAMPLE,
    other_arithmetic: bool = False,
    watch: Watch = lambda done, total: None,
) -> Context:
    """Take over a context that another machine has exported. `identity`: of the model here, which is `loaded`. Raises
    `KvistError`, and leaves nothing behind, for a file that is none, is damaged, belongs to another model, or holds
    what its tokens do not give. Where sums are rounded otherwise that cannot be told, and nothing is computed again."""
    layout, most_tokens = loaded.layout, loaded.config.max_positions
    with _opened(path) as file:
        found, start = _read_description(file, path, most_tokens)
        differs = found.identity.differences(identity)
        _check_identity(path, identity, differs, other_arithmetic)
        if (found.block_size, found.block_bytes) != (layout.block_size, layout.block_bytes):
            raise KvistError(f"{path} is damaged: its blocks are not those of its layout")
        if any(token >= loaded.config.vocab_size for token in found.tokens):
            raise KvistError(f"{path} is damaged: it has tokens that the model does not know")
        count = len(found.tokens) // found.block_size
        elsewhere = bool(differs) or found.elsewhere
        chosen = set[int]() if elsewhere else drawn(count, check)
        is_right = not elsewhere and (check is Check.TRUST or len(chosen) == count)
        local = replace(
            found,
            name=check_name(name or found.name),
            tenant=contexts.tenant,
            identity=identity,
            created=time.time(),
            elsewhere=elsewhere,
            imported="",
            checked=len(chosen),
        )
        check_room(local, most_tokens, disk)
        total = 2 * count + (max(chosen) + 1 if chosen else 0)
        size = record_bytes(found.block_size, found.block_bytes)
        digest = _check_whole(file, path, start + count * size, lambda done: watch(done // size, total))
        if not is_right:
            local = replace(local, imported=digest)
        records = _Records(file, path, start, found)
        try:
            check_blocks(loaded, found.tokens, records.payloads(), chosen, lambda done: watch(count + done, total))
        except KvistError as error:
            raise KvistError(f"{path}, {error}") from None
        written = list[str]()
        try:
            for done, (payload, our) in enumerate(zip(records.payloads(), local.blocks, strict=True)):
                watch(total - count + done, total)
                try:
                    _put(our, payload, disk, written)
                except TierError as error:
                    raise KvistError(f"{path}, block {done + 1}: {error}") from None
            finish(local, contexts, disk)
        except BaseException:  # Ctrl-C, too
            for block in written:
                disk.remove(block)
            raise
    return local


def _check_identity(path: Path, identity: Identity, differs: Sequence[str], other_arithmetic: bool) -> None:
    """Raises `KvistError` where what made a file's KV must not differ from `identity` as it does."""
    serious = [field for field in differs if field not in _ARITHMETIC]
    if serious:
        raise KvistError(f"{path} was made by another model than {identity.model}: {', '.join(serious)} differ")
    if differs and not other_arithmetic:
        raise KvistError(
            f"{path} was made by the same model, but where sums are rounded otherwise ({', '.join(differs)}): "
            "answers may differ from those computed here in rare words; --other-arithmetic takes it all the same"
        )


@dataclass(frozen=True)
class _Records:
    """The records of a file, from `start` on."""

    file: BinaryIO
    path: Path
    start: int
    described: Context

    def payloads(self) -> Iterator[memoryview]:
        """The planes of its blocks, in order. Raises `KvistError` for a record that is not what it must be."""
        size = record_bytes(self.described.block_size, self.described.block_bytes)
        self.file.seek(self.start)
        for number, block in enumerate(self.described.blocks, 1):
            try:
                yield read_payload(self.file.read(size), block, self.described.block_bytes)
            except BadRecord as error:
                raise KvistError(f"{self.path}, block {number}: {error}") from None


def _put(block: BlockId, payload: memoryview, disk: DiskTier, written: list[str]) -> None:
    """Write a block, and note it in `written` unless it was there. One that was, and may be damaged, is written
    anew."""
    known = disk.contains(block.name)
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


def _check_whole(file: BinaryIO, path: Path, end: int, watch: Callable[[int], None]) -> str:
    """The file's digest (hex). Raises `KvistError` unless the file has exactly the length and the digest that it should
    have. `watch` is told of bytes."""
    length = os.fstat(file.fileno()).st_size
    if length != end + _DIGEST:
        raise KvistError(f"{path} is damaged: it has {length:,} bytes where {end + _DIGEST:,} belong")
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    for piece in _pieces(file, end):
        digest.update(piece)
        done += len(piece)
        watch(done)
    if file.read(_DIGEST) != digest.digest():
        raise KvistError(f"{path} is damaged: its digest is another one")
    return digest.hexdigest()


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0:
        piece = file.read(min(length, 1 << 22))
        if not piece:
            return
        length -= len(piece)
        yield piece
