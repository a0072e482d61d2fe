"""`GET /v1/models`: the one model that a server has."""

from fastapi import APIRouter

from kvist.server.errors import ApiError
from kvist.server.openai.replies import Model, ModelList, answers
from kvist.service.serving import Serving

_SHOWN = 100  # characters of a name that is not known


def add_models(routes: APIRouter, serving: Serving) -> None:
    """Add the routes."""

    @routes.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def models() -> ModelList:
        return {"object": "list", "data": [_model(serving)]}

    # The name may have slashes, as names on a model hub have.
    @routes.get("/v1/models/{name:path}", response_model=None, responses=answers(Model))
    async def model(name: str) -> Model:
        check_model(serving, name)
        return _model(serving)


def check_model(serving: Serving, name: str | None) -> None:
    """Raises `ApiError` (404) for a model that is not the one served. None means that one."""
    if name is not None and name != serving.name:
        text = f"there is no model {name[:_SHOWN]!r} here; this server has {serving.name!r}"
        raise ApiError(404, text, code="model_not_found", param="model")


def _model(serving: Serving) -> Model:
    return {
        "id": serving.name,
        "object": "model",
        "created": serving.created,
        "owned_by": "kvist",
        "max_model_len": serving.context,
    }
