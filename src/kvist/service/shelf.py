"""The contexts of a server: each tenant makes, uses and removes its own."""

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from kvist.base.errors import KvistError, NoRoom, RequestError
from kvist.cache.manager import CacheManager
from kvist.runtime.request import Request
from kvist.service.aside import Aside
from kvist.service.context_making import context_tokens, usable
from kvist.service.contexts import Context, Contexts, NoSuchContext, check_name, check_room, describe, finish, release
from kvist.service.keeping import Kept
from kvist.service.loaded import Loaded
from kvist.service.session import Job, Session
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import Tokenizer

_PATIENCE = 600.0  # seconds in which all of a context must have been written


class Host(Protocol):
    """A model that is served: what a shelf needs of it."""

    loaded: Loaded
    tokenizer: Tokenizer
    template: ChatTemplate | None
    aside: Aside

    @property
    def manager(self) -> CacheManager: ...

    def submit(self, job: Job) -> Session: ...


class Shelf:
    """Over the kept cache of a model that is served, whose engine computes what is new."""

    def __init__(self, serving: Host, kept: Kept) -> None:
        self._serving = serving
        self._kept = kept
        self._pinning = threading.Lock()  # held by who changes which contexts there are, and with them what is pinned

    @property
    def used(self) -> int:
        """Bytes on disk of all that is kept there, other models' included."""
        return self._kept.disk.used

    async def make(self, tenant: str, name: str, form: str, text: str) -> Context:
        """Compute a context and keep it. Raises `KvistError` for a name, or a text, that cannot be one, and `NoRoom`
        where its tenant has none on disk."""
        check_name(name)
        serving, kept, layout = self._serving, self._kept, self._serving.loaded.layout

        def read() -> Context:
            tokens = context_tokens(form, text, serving.template, serving.tokenizer)
            size, block_bytes = layout.block_size, layout.block_bytes
            found = describe(name, tenant, form, text, tokens, (), kept.identity, size, block_bytes)
            check_room(found, serving.loaded.config.max_positions, kept.disk)
            return found

        context = await serving.aside.run(tenant, read)
        if serving.manager.begins_public(context.tokens):
            raise RequestError("the text begins with a prompt that this server keeps for all: ask with it, it is read")
        refused = kept.disk.refused
        try:
            await self._compute(context)
            blocks, end = [block.name for block in context.blocks], time.monotonic() + _PATIENCE
            while not all(map(kept.disk.contains, blocks)) and time.monotonic() < end and self._is_writing(context):
                await asyncio.sleep(0.02)
            if kept.disk.refused > refused and not all(map(kept.disk.contains, blocks)):
                raise NoRoom(
                    "the context found no room on disk beside what you and others keep there; remove some of your "
                    "contexts, or have more room given"
                )
            await serving.aside.run(tenant, lambda: self._finish(context))
        except BaseException:
            with self._pinning:
                release([block.name for block in context.blocks], kept.disk)
            raise
        return context

    def _finish(self, context: Context) -> None:
        with self._pinning:
            finish(context, self._contexts(context.tenant), self._kept.disk)

    async def _compute(self, context: Context) -> None:
        """Have its tokens run, and its blocks handed over to be written."""
        request = Request(context.tokens, 1, tenant=context.tenant, durable=True)
        session = self._serving.submit(Job(request))
        session.name(f"context {context.name}")
        try:
            async for delta in session:
                if delta.error is not None:
                    raise delta.error
        finally:
            session.cancel()

    def get(self, tenant: str, name: str) -> Context:
        """One that a prompt shall begin with. Raises `NoSuchContext` for a name that there is not, `KvistError` for one
        that is damaged or another model's."""
        contexts = self._contexts(tenant)
        found = usable(contexts.get(name), self._kept)
        contexts.touch(name)
        return found

    def list(self, tenant: str) -> list[dict[str, Any]]:
        """What there is to say of each, in the order of their names."""
        contexts, rows = self._contexts(tenant), list[dict[str, Any]]()
        for name in contexts.names():
            try:
                rows.append(self._facts(contexts.get(name)))
            except KvistError:
                rows.append({"name": name, "object": "context", "damaged": True})
        return rows

    def show(self, tenant: str, name: str) -> dict[str, Any]:
        """What there is to say of one. Raises `NoSuchContext`."""
        try:
            return self.details(self._contexts(tenant).get(name))
        except NoSuchContext:
            raise
        except KvistError:
            return {"name": name, "object": "context", "damaged": True}

    def details(self, context: Context) -> dict[str, Any]:
        """What there is to say of one, with what of it is on disk."""
        blocks = [block.name for block in context.blocks]
        there = sum(map(self._kept.disk.contains, blocks))
        return {**self._facts(context), "blocks": len(blocks), "blocks_on_disk": there}

    def remove(self, tenant: str, name: str) -> None:
        """Raises `NoSuchContext` when there is none of that name."""
        with self._pinning:
            self._contexts(tenant).remove(name, self._kept.disk)

    def _contexts(self, tenant: str) -> Contexts:
        return Contexts(self._kept.disk.folder, tenant)

    def _facts(self, context: Context) -> dict[str, Any]:
        return {
            "name": context.name,
            "object": "context",
            "form": context.form,
            "model": context.identity.model,
            "tokens": len(context.tokens),
            "bytes": context.nbytes,
            "kv": context.identity.kv,
            "created": int(context.created),
            "shared": not context.imported,
            "usable": not context.identity.differences(self._kept.identity),
        }

    def _is_writing(self, context: Context) -> bool:
        """Whether those of its blocks that are not there yet may still come: none of them is lost."""
        losses = self._kept.cache.losses
        return all(self._kept.disk.contains(block.name) or losses.of(block.name) is None for block in context.blocks)


def with_context(messages: Sequence[Any], context: Context) -> tuple[Any, ...]:
    """The conversation with the context's text at the beginning of its system message."""
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        if not isinstance(first.get("content"), str):
            raise RequestError("the system message must be a text where a context stands before it")
        return {**first, "content": f"{context.text}\n\n{first['content']}"}, *messages[1:]
    return {"role": "system", "content": context.text}, *messages


def check_begins(prompt: Sequence[int], context: Context) -> None:
    """Raises `RequestError` unless the prompt begins with the context's whole blocks, or all but the last."""
    count = len(context.tokens) // context.block_size * context.block_size - context.block_size
    if tuple(prompt[:count]) != context.tokens[:count]:
        raise RequestError(
            f"the context {context.name!r} does not stand at the beginning of the prompt: the chat template puts "
            "something else there with these tools or settings"
        )
