"""The contexts of a server: each tenant makes, uses and removes its own."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvist.base.errors import KvistError, RequestError
from kvist.runtime.request import Request
from kvist.service.context_making import context_tokens, usable
from kvist.service.contexts import Context, Contexts, check_name, check_room, describe, finish
from kvist.service.keeping import Kept
from kvist.service.loaded import Loaded
from kvist.service.session import Job, Session

_PATIENCE = 600.0  # seconds in which all of a context must have been written


class Shelf:
    """Over the kept cache of a model that is served. `submit` runs a job on its engine."""

    def __init__(self, loaded: Loaded, kept: Kept, submit: Callable[[Job], Session]) -> None:
        self._loaded = loaded
        self._kept = kept
        self._submit = submit

    async def make(self, tenant: str, name: str, form: str, text: str) -> Context:
        """Compute a context and keep it. Raises `KvistError` for a name, or a text, that cannot be one."""
        check_name(name)
        loaded, kept, layout = self._loaded, self._kept, self._loaded.layout
        tokens = context_tokens(loaded, form, text)
        check_room(len(tokens), loaded.config.max_positions, kept.disk, layout.block_size, layout.block_bytes)
        session = self._submit(Job(Request(tuple(tokens), 1, tenant=tenant)))
        try:
            async for delta in session:
                if delta.error is not None:
                    raise delta.error
        finally:
            session.cancel()
        context = describe(name, tenant, form, text, tokens, (), kept.identity, layout.block_size, layout.block_bytes)
        blocks, end = [block.name for block in context.blocks], time.monotonic() + _PATIENCE
        while not all(map(kept.disk.contains, blocks)) and time.monotonic() < end and self._is_writing(context):
            await asyncio.sleep(0.02)
        finish(context, Contexts(kept.disk.folder, tenant), kept.disk)
        return context

    def get(self, tenant: str, name: str) -> Context:
        """Raises `KvistError` for a name that there is not, or that is another model's."""
        contexts = Contexts(self._kept.disk.folder, tenant)
        found = usable(contexts.get(name), self._kept)
        contexts.touch(name)
        return found

    def list(self, tenant: str) -> list[dict[str, Any]]:
        """What there is to say of each, in the order of their names."""
        contexts, rows = Contexts(self._kept.disk.folder, tenant), list[dict[str, Any]]()
        for name in contexts.names():
            try:
                rows.append(self.facts(contexts.get(name)))
            except KvistError:
                rows.append({"name": name, "object": "context", "damaged": True})
        return rows

    def facts(self, context: Context) -> dict[str, Any]:
        """What there is to say of one."""
        return {
            "name": context.name,
            "object": "context",
            "form": context.form,
            "model": context.identity.model,
            "tokens": len(context.tokens),
            "bytes": context.nbytes,
            "kv": context.identity.kv,
            "created": int(context.created),
            "usable": not context.identity.differences(self._kept.identity),
        }

    def remove(self, tenant: str, name: str) -> None:
        """Raises `KvistError` when there is none of that name."""
        Contexts(self._kept.disk.folder, tenant).remove(name, self._kept.disk)

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
