"""A server in this process, on a port of its own, for as long as it is measured."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvist.runtime.engine import Engine
from kvist.server.app import create_app
from kvist.server.run import Server, listen, url_of
from kvist.server.settings import ServerSettings
from kvist.service.loaded import Loaded
from kvist.service.serving import Serving


@dataclass(frozen=True)
class Served:
    """Where it listens, and the engine whose counters are read."""

    url: str
    engine: Engine


@contextlib.contextmanager
def served(loaded: Loaded, tokens: int, running: int, keys: Sequence[str] = ()) -> Iterator[Served]:
    """A server whose cache holds `tokens` tokens, for `running` answers at once. `keys`: API keys, of a tenant each."""
    engine = loaded.engine(loaded.budget_of(-(-tokens // loaded.layout.block_size) + running, running))
    serving = Serving(loaded, engine)
    settings = ServerSettings(api_keys=tuple(keys), timeout=86_400.0, grace=0.0)
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listening:
        server = Server(create_app(serving, settings), serving.stop, settings, ready.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), name="kvist-server")
        thread.start()
        try:
            ready.wait()
            yield Served(url_of(listening), engine)
        finally:
            server.handle_exit(0, None)
            thread.join()
