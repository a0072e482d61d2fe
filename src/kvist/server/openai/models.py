"""`GET /v1/models`: the model that a server has, and its adapters, each under a name of its own; and what the names
that clients send stand for. Clients of Anthropic, told by their header, get the list in the shape of theirs."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response

from kvist.base.units import utc_time
from kvist.server.errors import BOTH_RESPONSES, ApiError, anthropic_error, problem_of
from kvist.server.openai.replies import Model, ModelInfo, ModelList, ModelPage, answers, reply
from kvist.service.serving import Serving

_SHOWN = 100  # characters of a name that is not known
_MOST_PAGE = 1000
_PAGE = 20  # models on a page of Anthropic's, where nothing is said

Version = Annotated[str | None, Header(alias="anthropic-version", max_length=64)]
Cursor = Annotated[str | None, Query(max_length=256, description="Of Anthropic's pages: the id of a model.")]
Limit = Annotated[int, Query(ge=1, le=_MOST_PAGE, description="Of Anthropic's pages.")]


@dataclass(frozen=True)
class Served:
    """What a client asks: the name it goes by, and the id of its adapter, if it has one."""

    name: str
    adapter: str = ""


def add_models(routes: APIRouter, serving: Serving) -> None:
    """Add the routes."""

    @routes.get("/v1/models", response_model=None, responses=answers(ModelList | ModelPage))
    async def models(
        version: Version = None, after_id: Cursor = None, before_id: Cursor = None, limit: Limit = _PAGE
    ) -> ModelList | ModelPage:
        if version is not None:
            return _page(serving, after_id, before_id, limit)
        return {"object": "list", "data": [_model(serving, name) for name in names(serving)]}

    # The name may have slashes, as names on a model hub have.
    @routes.get(
        "/v1/models/{name:path}", response_model=None, responses={**BOTH_RESPONSES, **answers(Model | ModelInfo)}
    )
    async def model(request: Request, name: str, version: Version = None) -> Response:
        known = name in names(serving)
        if version is None:
            if not known:
                raise _unknown(serving, name)
            return reply(_model(serving, name))
        if not known:
            problem = problem_of(_unknown(serving, name))
            told = reply(anthropic_error(problem, request.scope.get("state", {}).get("request_id")))
            told.status_code = problem.status
            return told
        return reply(_info(serving, name))


def names(serving: Serving) -> list[str]:
    """The ids that are listed: the model's, then its adapters'."""
    return [serving.name, *serving.adapters]


def served(serving: Serving, name: str | None) -> Served:
    """What a model's name stands for; None: the model itself. Where one model is served any name stands for it, unless
    the server is strict; beside adapters a name is one of those that there are. Raises `ApiError` (404)."""
    if name in serving.adapters:
        return Served(name, serving.adapters[name])
    if name is None or name == serving.name or not (serving.strict_model or serving.adapters):
        return Served(serving.name)
    raise _unknown(serving, name)


def _unknown(serving: Serving, name: str) -> ApiError:
    known = ", ".join(map(repr, names(serving)))
    text = f"there is no model {name[:_SHOWN]!r} here; this server has {known}"
    return ApiError(404, text, code="model_not_found", param="model")


def _model(serving: Serving, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "kvist",
        "max_model_len": serving.context,
        "sampling": serving.proposed.shown(),
    }


def _info(serving: Serving, name: str) -> ModelInfo:
    return {"type": "model", "id": name, "display_name": name, "created_at": utc_time(serving.created)}


def _page(serving: Serving, after: str | None, before: str | None, limit: int) -> ModelPage:
    """The models behind `after`, or the last ones before `before`; a cursor that is no model's gives none."""
    known = names(serving)
    if before is not None:
        left = known[: known.index(before)] if before in known else []
        page, more = left[-limit:], len(left) > limit
    else:
        start = 0 if after is None else known.index(after) + 1 if after in known else len(known)
        page, more = known[start : start + limit], len(known) > start + limit
    first, last = (page[0], page[-1]) if page else (None, None)
    return {"data": [_info(serving, name) for name in page], "has_more": more, "first_id": first, "last_id": last}
