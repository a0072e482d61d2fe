"""The application: the routes of four APIs and a few of its own, behind the middlewares that guard them.

From the outside in: `RequestLog`, CORS where pages of other origins may ask, `Gate`, `Intake`, the routes.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import Response

from kvist.base.version import __version__
from kvist.server import anthropic, cache, contexts, llamacpp, ollama, openai
from kvist.server.errors import ApiError, install
from kvist.server.limits import guard
from kvist.server.logs import RequestLog
from kvist.server.metrics import Metrics
from kvist.server.pages import add_pages
from kvist.server.settings import ServerSettings
from kvist.server.tokens import router as tokens
from kvist.service.serving import Serving


def create_app(serving: Serving, settings: ServerSettings) -> FastAPI:
    """An ASGI application that starts `serving` when it is started itself, and stops it when it ends.

    `/openapi.json` describes it, and `/docs` shows that. FastAPI's own make the description on the event loop, and load
    their pages' scripts from elsewhere.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.start()
        # FastAPI makes an included route when a request is first compared with it, which takes a while.
        for route in app.routes:
            route.matches({"type": "http", "method": "GET", "path": "/", "root_path": "", "headers": []})
        yield
        await serving.stop(0)

    app = FastAPI(
        title="Kvist",
        version=__version__,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    metrics = Metrics(serving.load, serving.kept)
    serving.listener = metrics.observe
    install(app)
    app.include_router(openai.router(serving, settings))
    app.include_router(anthropic.router(serving, settings))
    app.include_router(ollama.router(serving))
    app.include_router(llamacpp.router(serving))
    app.include_router(tokens(serving))
    app.include_router(cache.router(serving))
    app.include_router(contexts.router(serving))
    _add_own(app, serving, metrics)
    add_pages(app, serving.name)
    guard(app, settings)
    app.add_middleware(RequestLog, answered=metrics.answered)
    return app


def _add_own(app: FastAPI, serving: Serving, metrics: Metrics) -> None:
    """What is asked about the server itself. `/health` needs no API key; `/metrics` does, where there are keys, and an
    operator's where these are several tenants'."""

    @app.get("/health", tags=["Kvist"], responses={503: {"description": "The engine does not run, or not get on."}})
    async def health() -> dict[str, str]:
        if (trouble := serving.trouble) is not None:
            raise ApiError(503, trouble, code="no_progress" if serving.alive else "not_running")
        return {"status": "ok"}

    @app.get("/version", tags=["Kvist"])
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", tags=["Kvist"], response_class=Response)
    async def render() -> Response:
        text, content_type = metrics.render()
        return Response(text, headers={"content-type": content_type})
