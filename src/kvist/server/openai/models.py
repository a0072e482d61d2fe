"""`GET /v1/models`: the model that a server has, and its adapters, each under a name of its own."""

from dataclasses import dataclass

from fastapi import APIRouter

from kvist.server.errors import ApiError
from kvist.server.openai.replies import Model, ModelList, answers
from kvist.service.serving import Serving

_SHOWN = 100  # characters of a name that is not known


def add_models(routes: APIRouter, serving: Serving) -> None:
    """Add the routes."""

    @routes.get("/v1/models", response_model=None, responses=answers(ModelList))
    async def models() -> ModelList:
        return {"object": "list", "data": [_model(serving, name) for name in (serving.name, *serving.adapters)]}

    # The name may have slashes, as names on a model hub have.
    @routes.get("/v1/models/{name:path}", response_model=None, responses=answers(Model))
    async def model(name: str) -> Model:
        return _model(serving, served(serving, name).name)


@dataclass(frozen=True)
class Served:
    """What a client asks: the name it goes by, and the id of its adapter, if it has one."""

    name: str
    adapter: str = ""


def served(serving: Serving, name: str | None) -> Served:
    """What a model's name stands for; None: the model itself. Raises `ApiError` (404) for what is not served."""
    if name is None or name == serving.name:
        return Served(serving.name)
    if name not in serving.adapters:
        known = ", ".join(map(repr, (serving.name, *serving.adapters)))
        text = f"there is no model {name[:_SHOWN]!r} here; this server has {known}"
        raise ApiError(404, text, code="model_not_found", param="model")
    return Served(name, serving.adapters[name])


def _model(serving: Serving, name: str) -> Model:
    return {
        "id": name,
        "object": "model",
        "created": serving.created,
        "owned_by": "kvist",
        "max_model_len": serving.context,
        "sampling": serving.proposed.shown(),
    }
