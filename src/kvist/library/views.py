"""What an LLM's cache holds and keeps, to look at and to name. `Async...` is awaited on the LLM's event loop; the
others are its twins for everybody else."""

import asyncio
from collections.abc import Callable
from typing import Any

from kvist.base.errors import RequestError
from kvist.library import cache_view
from kvist.library.cache_view import CacheUsage, PrefixNode
from kvist.service.contexts import CHAT, TEXT, Context
from kvist.service.explanation import Explanation
from kvist.service.serving import Serving
from kvist.service.shelf import Shelf


class AsyncCache:
    """What an LLM's cache holds, and why prompts were computed. `last`: the name of the last answer."""

    def __init__(self, serving: Callable[[], Serving]) -> None:
        self._serving = serving
        self.last = ""

    async def usage(self) -> CacheUsage:
        """Blocks and bytes in use, by codec, tenant and tier."""
        serving = self._serving()
        disk = None if serving.shelf is None else serving.shelf.used
        return await serving.call(lambda engine: cache_view.usage(engine, disk))

    async def prefixes(self) -> dict[str, tuple[PrefixNode, ...]]:
        """The tree of what is computed, by namespace; the library's own has the name ""."""
        return await self._serving().call(cache_view.prefixes)

    def explain(self) -> Explanation | None:
        """What of the last prompt was computed, and why; None before there is one, and where nothing can be told."""
        return self._serving().explainer.told("", self.last)

    async def check(self) -> None:
        """Raises `InvariantError` unless the cache is consistent."""
        await self._serving().check()


class AsyncContexts:
    """Named prefixes, computed once and kept on disk (`cache_disk`), with which prompts may begin."""

    def __init__(self, serving: Callable[[], Serving]) -> None:
        self._serving = serving

    async def make(self, name: str, text: str, *, chat: bool = False) -> None:
        """Compute a context and keep it; one of that name is replaced. `chat`: for conversations, of whose system
        message it stands at the beginning. Raises `KvistError` for a name or a text that cannot be one."""
        await self._shelf().make("", name, CHAT if chat else TEXT, text)

    async def list(self) -> list[dict[str, Any]]:
        """What there is to say of each, in the order of their names."""
        return await asyncio.to_thread(self._shelf().list, "")

    async def remove(self, name: str) -> None:
        """Raises `KvistError` when there is none of that name."""
        await asyncio.to_thread(self._shelf().remove, "", name)

    def get(self, name: str | None) -> Context | None:
        """The context of that name, if any is asked for. Raises `KvistError` when there is none, or another model made
        it."""
        return None if name is None else self._shelf().get("", name)

    def _shelf(self) -> Shelf:
        shelf = self._serving().shelf
        if shelf is None:
            raise RequestError("contexts are kept on disk: open the LLM with cache_disk, as in cache_disk='20GB'")
        return shelf


class Cache:
    """What an LLM's cache holds, and why prompts were computed."""

    def __init__(self, twin: AsyncCache, run: Callable[..., Any]) -> None:
        self._twin = twin
        self._run = run

    def usage(self) -> CacheUsage:
        """Blocks and bytes in use, by codec, tenant and tier."""
        found: CacheUsage = self._run(self._twin.usage)
        return found

    def prefixes(self) -> dict[str, tuple[PrefixNode, ...]]:
        """The tree of what is computed, by namespace; the library's own has the name ""."""
        found: dict[str, tuple[PrefixNode, ...]] = self._run(self._twin.prefixes)
        return found

    def explain(self) -> Explanation | None:
        """What of the last prompt was computed, and why; None before there is one, and where nothing can be told."""
        return self._twin.explain()

    def check(self) -> None:
        """Raises `InvariantError` unless the cache is consistent."""
        self._run(self._twin.check)


class Contexts:
    """Named prefixes, computed once and kept on disk (`cache_disk`), with which prompts may begin."""

    def __init__(self, twin: AsyncContexts, run: Callable[..., Any]) -> None:
        self._twin = twin
        self._run = run

    def make(self, name: str, text: str, *, chat: bool = False) -> None:
        """Compute a context and keep it; one of that name is replaced. `chat`: for conversations, of whose system
        message it stands at the beginning. Raises `KvistError` for a name or a text that cannot be one."""
        self._run(self._twin.make, name, text, chat=chat)

    def list(self) -> list[dict[str, Any]]:
        """What there is to say of each, in the order of their names."""
        found: list[dict[str, Any]] = self._run(self._twin.list)
        return found

    def remove(self, name: str) -> None:
        """Raises `KvistError` when there is none of that name."""
        self._run(self._twin.remove, name)
