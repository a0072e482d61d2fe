"""Contexts over HTTP: named prefixes that are computed once. Each tenant has its own."""

import logging
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from pydantic import BaseModel, Field

from kvist.base.errors import KvistError, NoRoom, NumericsError, Overloaded, RequestError, Stopping, TextError, TimedOut
from kvist.server.errors import RESPONSES, ApiError
from kvist.server.limits import tenant_of
from kvist.service.contexts import CHAT, TEXT, Context, NoSuchContext
from kvist.service.serving import Serving
from kvist.service.shelf import Shelf

log = logging.getLogger("kvist.server")

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, PathParameter(pattern=_NAME)]


class ContextBody(BaseModel):
    """A text to keep. `form`: "chat", its default where the model chats: it begins the system message; "text": a
    completion's prompt begins with it."""

    name: str = Field(pattern=_NAME)
    text: str = Field(min_length=1)
    form: Literal["chat", "text"] | None = None


def context_of(serving: Serving, request: Request, name: str | None, form: str) -> Context | None:
    """The tenant's context of that name, if one is named. Raises `ApiError`: 404 when there is none, 400 when it cannot
    be used here."""
    if name is None:
        return None
    shelf = _shelf(serving)
    try:
        found = shelf.get(tenant_of(request), name)
    except NoSuchContext as error:
        raise ApiError(404, str(error), param="context", code="context_not_found") from None
    except KvistError as error:
        raise ApiError(400, str(error), param="context", code="context_unusable") from None
    if found.form != form:
        raise ApiError(400, f"the context {name!r} is of form {found.form!r}, and {form!r} is needed", param="context")
    return found


def router(serving: Serving) -> APIRouter:
    """`/v1/contexts`. Descriptions are read beside the event loop: there may be many, each with all of its tokens."""
    routes = APIRouter(tags=["Kvist"], responses=RESPONSES)

    @routes.post("/v1/contexts")
    async def make(body: ContextBody, request: Request) -> dict[str, Any]:
        """Compute a context and keep it; one of that name is replaced."""
        shelf = _shelf(serving)
        form = body.form or (TEXT if serving.template is None else CHAT)
        try:
            made = await shelf.make(tenant_of(request), body.name, form, body.text)
        except (RequestError, TextError, NumericsError, NoRoom, Overloaded, Stopping, TimedOut):
            raise  # they have their own answers
        except KvistError as error:  # it may say where things lie on this machine
            log.error("the context %s of tenant %r could not be kept: %s", body.name, tenant_of(request), error)
            raise ApiError(500, "the context could not be kept; the server's log says why", code="not_kept") from None
        return shelf.details(made)

    @routes.get("/v1/contexts")
    async def listed(request: Request) -> dict[str, Any]:
        """All that this tenant has."""
        shelf, tenant = _shelf(serving), tenant_of(request)
        return {"object": "list", "data": await serving.aside.run(tenant, lambda: shelf.list(tenant))}

    @routes.get("/v1/contexts/{name}")
    async def show(name: Name, request: Request) -> dict[str, Any]:
        """One of them."""
        shelf, tenant = _shelf(serving), tenant_of(request)
        try:
            return await serving.aside.run(tenant, lambda: shelf.show(tenant, name))
        except NoSuchContext:
            raise _missing(name) from None

    @routes.delete("/v1/contexts/{name}")
    async def remove(name: Name, request: Request) -> dict[str, Any]:
        """Forget it. Its room on disk is given up when it is needed."""
        shelf, tenant = _shelf(serving), tenant_of(request)
        try:
            await serving.aside.run(tenant, lambda: shelf.remove(tenant, name))
        except NoSuchContext:
            raise _missing(name) from None
        return {"name": name, "object": "context", "deleted": True}

    return routes


def _shelf(serving: Serving) -> Shelf:
    if serving.shelf is None:
        raise ApiError(
            400,
            "contexts are kept on disk, and this server keeps nothing there; start it with --cache-disk",
            code="no_disk",
        )
    return serving.shelf


def _missing(name: str) -> ApiError:
    return ApiError(404, f"there is no context {name!r}", code="context_not_found")
