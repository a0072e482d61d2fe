"""Named prefixes that a user keeps: computed once, pinned on disk, read again instead of computed.

A context is a text and its tokens, described in a file of its own; its KV is ordinary blocks of its tenant, pinned for
as long as the context is there. So whatever begins with its tokens finds them, and losing a block loses only time."""

import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import ContextError, KvistError, NoRoom, RequestError
from kvist.base.files import atomic_file, private_folder
from kvist.base.units import format_bytes, plural
from kvist.cache.disk import DiskTier
from kvist.cache.keys import root_key
from kvist.cache.record import BlockId, record_bytes
from kvist.cache.shares import Share
from kvist.runtime.request import namespace_of
from kvist.service.identity import Identity
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import Tokenizer

FOLDER = "contexts"
TEXT, CHAT = FORMS = ("text", "chat")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"(?:[0-9a-f]{64})?")
_OWNER = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 64 << 20  # of a description
_MOST_TEXT = 8 << 20  # characters of a text
_MOST_SECONDS = 1 << 40  # of the epoch
_MARK = "THE CONTEXT ENDS HERE"
_LOOSE = 8  # tokens at the end of a text that may be others when something follows


@dataclass(frozen=True)
class Context:
    """`form`: "text", whose tokens a prompt begins with; or "chat", whose text begins the system message, and whose
    tokens are those that the model's template makes of it. `sources`: names of files. `created`: seconds of the epoch.
    `tenant`: whose it is. `identity`: what made its KV; `elsewhere`: on a machine with other arithmetic. `imported`:
    digest (hex) of the file that it came in, where its KV is not known to be what its tokens give: prompts that do not
    name it never read it. `checked`: how many of its blocks were computed again when it came."""

    name: str
    tenant: str
    form: str
    text: str
    tokens: tuple[int, ...]
    sources: tuple[str, ...]
    created: float
    block_size: int
    block_bytes: int
    identity: Identity
    elsewhere: bool = False
    imported: str = ""
    checked: int = 0

    @property
    def root(self) -> bytes:
        """The key of the root that its blocks stand behind."""
        return root_key(self.identity.digest, namespace_of(self.tenant, imported=self.imported))

    @property
    def blocks(self) -> list[BlockId]:
        """Its whole blocks, in order. What is left of its tokens is computed again."""
        return blocks_of(self.tokens, self.root, self.block_size)

    @property
    def nbytes(self) -> int:
        """What its blocks take on disk."""
        return len(self.tokens) // self.block_size * record_bytes(self.block_size, self.block_bytes)

    @property
    def namespace(self) -> str:
        """Where its blocks lie, as tiers call it."""
        return self.root.hex()[:32]

    def to_bytes(self) -> bytes:
        """JSON that `read_context` reads. Raises `KvistError` for more than it may be."""
        data = json.dumps(asdict(self), ensure_ascii=False).encode()
        if len(data) > _MOST_BYTES:
            raise KvistError(
                f"the description of {self.name} takes {format_bytes(len(data))}; a part of the text will do"
            )
        return data


class NoSuchContext(KvistError):
    """There is no context of that name, or there can be none."""


def blocks_of(tokens: Sequence[int], namespace: bytes, size: int) -> list[BlockId]:
    """The whole blocks of a sequence."""
    parent, blocks = namespace, list[BlockId]()
    for start in range(0, len(tokens) - size + 1, size):
        blocks.append(BlockId.after(namespace, parent, tuple(tokens[start : start + size])))
        parent = blocks[-1].key
    return blocks


def read_context(data: bytes) -> Context:
    """Raises `KvistError` for what describes no context."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KvistError(f"it is no JSON: {error}") from None
    if not isinstance(value, dict) or value.keys() != Context.__dataclass_fields__.keys():
        raise KvistError("it describes no context of this version")
    kinds: Mapping[str, Any] = {
        "name": str, "tenant": str, "form": str, "text": str, "tokens": list, "sources": list, "created": float,
        "block_size": int, "block_bytes": int, "identity": dict, "elsewhere": bool,
        "imported": str, "checked": int,
    }  # fmt: skip
    for field, kind in kinds.items():
        if type(value[field]) is not kind:
            raise KvistError(f"it describes no context: {field} is not what it should be")
    if not all(type(token) is int and 0 <= token < 2**32 for token in value["tokens"]):
        raise KvistError("it describes no context: tokens are not what they should be")
    if not all(type(source) is str for source in value["sources"]) or value["form"] not in FORMS:
        raise KvistError("it describes no context: sources or form are not what they should be")
    if not all(_is_text(text) for text in (value["text"], value["tenant"], *value["sources"])):
        raise KvistError("it describes no context: a text holds what is no character")
    if not 0 <= value["created"] <= _MOST_SECONDS:  # nor is NaN
        raise KvistError("it describes no context: created is no time")
    if not (16 <= value["block_size"] <= 512 and 0 < value["block_bytes"] < 2**32):
        raise KvistError("it describes no context: its blocks have impossible sizes")
    if not (_FILE.fullmatch(value["imported"]) and 0 <= value["checked"] <= len(value["tokens"])):
        raise KvistError("it describes no context: imported or checked are not what they should be")
    check_name(value["name"])
    fields = {**value, "tokens": tuple(value["tokens"]), "sources": tuple(value["sources"])}
    return Context(**{**fields, "identity": Identity.of_json(value["identity"])})


def check_name(name: str) -> str:
    """The name. Raises `NoSuchContext` for one that no context can have."""
    if not _NAME.fullmatch(name):
        raise NoSuchContext(
            f"a context's name has up to 64 letters, digits, '.', '_' and '-', and begins with one of the first two, "
            f"unlike {name[:80]!r}"
        )
    return name


class Contexts:
    """The contexts of one tenant, in the folder of a kept cache. Nothing follows a symbolic link."""

    def __init__(self, folder: Path, tenant: str = "") -> None:
        self.tenant = tenant
        self._folder = folder / FOLDER / hashlib.sha256(f"tenant {tenant}".encode()).hexdigest()[:32]

    def names(self) -> list[str]:
        """All there are, in order."""
        return sorted(path.name[:-5] for path in _described(self._folder))

    def get(self, name: str) -> Context:
        """Raises `NoSuchContext` when there is none of that name, `KvistError` when its description is damaged."""
        path = self._path(name)
        if not path.is_file() or path.is_symlink():
            known = ", ".join(self.names()) or "there are none"
            raise NoSuchContext(f"there is no context {name!r} ({known})")
        found = _read(path)
        if found.name != name or found.tenant != self.tenant:
            raise KvistError(f"what describes the context {name!r} describes another context; remove {name!r}")
        return found

    def used(self, name: str) -> float:
        """When it was last used, or made: seconds of the epoch."""
        return self._path(name).stat().st_mtime

    def touch(self, name: str) -> None:
        """It is used now."""
        with contextlib.suppress(OSError):
            os.utime(self._path(name), follow_symlinks=False)

    def save(self, context: Context) -> None:
        """Describe it on disk: whole or not at all."""
        path = self._path(context.name)
        private_folder(self._folder.parent)
        private_folder(self._folder)
        with atomic_file(path, 0o600) as target:
            target.write_bytes(context.to_bytes())

    def remove(self, name: str, disk: DiskTier | None = None) -> None:
        """Forget it, damaged or not; its blocks stay on disk until their room is needed."""
        path = self._path(name)
        if not path.exists():
            self.get(name)  # says which there are
        blocks = self.blocks(name)
        path.unlink(missing_ok=True)
        if disk is not None:
            release(blocks, disk)

    def blocks(self, name: str) -> list[str]:
        """The names of its blocks; none where there is no such context, or it is damaged."""
        try:
            return [block.name for block in self.get(name).blocks]
        except KvistError:
            return []

    def _path(self, name: str) -> Path:
        check_name(name)
        if self._folder.is_symlink():
            raise KvistError("the folder of the contexts is a symbolic link, which is not followed")
        return self._folder / f"{name}.json"


def all_contexts(folder: Path) -> Iterator[Context]:
    """Those of all tenants in the folder of a kept cache; damaged ones are left out."""
    try:
        with os.scandir(folder / FOLDER) as found:
            owners = [e.path for e in found if _OWNER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for owner in sorted(owners):
        for path in _described(Path(owner)):
            with contextlib.suppress(KvistError):
                yield _read(path)


def pin_all(disk: DiskTier) -> None:
    """Have the blocks of all contexts stay."""
    for context in all_contexts(disk.folder):
        disk.pin([block.name for block in context.blocks], float("inf"))


def release(blocks: Sequence[str], disk: DiskTier) -> None:
    """These may go, unless a context has them."""
    if blocks:
        others = {block.name for other in all_contexts(disk.folder) for block in other.blocks}
        disk.unpin([block for block in blocks if block not in others])


def _sizes(context: Context) -> dict[str, int]:
    """Its blocks by name, and what each takes on disk."""
    return dict.fromkeys((b.name for b in context.blocks), record_bytes(context.block_size, context.block_bytes))


def chat_tokens(text: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> list[int]:
    """The tokens with which a chat begins whose system message begins with `text`. Raises `RequestError`."""
    if template is None:
        raise RequestError("this model has no chat template: make a context of the form 'text'")
    messages = [{"role": "system", "content": text + _MARK}, {"role": "user", "content": "-"}]
    before, mark, _ = template.render(messages).partition(_MARK)
    if not mark or text.strip() not in before:
        raise RequestError("this model's chat template has no place for a system message; make one of form 'text'")
    return tokenizer.encode(before, add_special=False)[:-_LOOSE]


def check_room(context: Context, most: int, disk: DiskTier) -> None:
    """Raises `ContextError`, with the numbers, when it can never be kept: in a model whose context holds `most` tokens,
    on this disk, in its tenant's share; and `NoRoom` when it cannot beside the contexts that are there."""
    tokens = len(context.tokens)
    if tokens < context.block_size:
        raise ContextError(
            f"the text has {plural(tokens, 'token')}; a context has at least {context.block_size}, one block"
        )
    if tokens >= most:
        raise ContextError(f"the text has {plural(tokens, 'token')} and the model's context holds {most:,}")
    pinned = dict[str, int]()  # bytes of blocks, each once, whoever shares it
    for other in all_contexts(disk.folder):
        pinned |= _sizes(other)
    needed = _sizes(context)
    share = disk.shares.get(context.namespace, Share(frozenset({context.namespace})))
    room = min(share.lasting, disk.budget)
    new = sum(size for name, size in needed.items() if name not in pinned)
    own = sum(size for name, size in pinned.items() if name[:32] in share.namespaces)
    # Of what others hold nothing is said: they are other tenants.
    if own + new > room:
        kind = ContextError if context.nbytes > room else NoRoom
        raise kind(
            f"the context takes {format_bytes(context.nbytes)} on disk, and of {format_bytes(room)} "
            f"your contexts hold {format_bytes(own)} already; remove some, or have more room given"
        )
    if sum(pinned.values()) + new > disk.budget:
        raise NoRoom(
            f"the context takes {format_bytes(context.nbytes)} on disk, and so much is not left; remove some of your "
            "contexts, or have more room given"
        )


def describe(
    name: str, tenant: str, form: str, text: str, tokens: Sequence[int], sources: Sequence[str], identity: Identity,
    block_size: int, block_bytes: int, now: Callable[[], float] = time.time,
) -> Context:  # fmt: skip
    """A context that is made now. Raises `ContextError` for a text that no context can have."""
    if len(text) > _MOST_TEXT:
        raise ContextError(f"the text has {plural(len(text), 'character')}, and a context at most {_MOST_TEXT:,}")
    return Context(
        check_name(name), tenant, form, text, tuple(tokens), tuple(sources), now(), block_size, block_bytes, identity
    )


def finish(context: Context, contexts: Contexts, disk: DiskTier) -> None:
    """Keep a context whose blocks have been written, in the place of one that had its name. Raises `NoRoom` when
    some of them are not there."""
    blocks = [block.name for block in context.blocks]
    missing = sum(not disk.contains(block) for block in blocks)
    if missing:
        raise NoRoom(f"{missing:,} of its {len(blocks):,} blocks could not be written; is the disk full?")
    replaced = contexts.blocks(context.name)
    disk.pin(blocks, math.inf)
    try:
        contexts.save(context)
    except BaseException:
        release(blocks, disk)
        raise
    release(replaced, disk)


def _described(folder: Path) -> list[Path]:
    """The descriptions in a folder, in order."""
    try:
        with os.scandir(folder) as found:
            entries = [e.path for e in found if e.name.endswith(".json") and e.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return [Path(path) for path in sorted(entries) if _NAME.fullmatch(Path(path).name[:-5])]


def _read(path: Path) -> Context:
    """The context that a file describes. Errors say its name, not where it lies: they may be a client's."""
    name = path.name[:-5]
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise KvistError(f"the context {name!r} cannot be read: {error.strerror or error}") from None
    try:
        if len(data) > _MOST_BYTES:
            raise KvistError("it is too large")
        return read_context(data)
    except KvistError as error:
        raise KvistError(f"the context {name!r} is damaged ({error}); remove the context and make it again") from None


def _is_text(text: str) -> bool:
    """Whether it can be encoded: JSON can also hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
