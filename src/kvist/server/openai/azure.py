"""Azure's paths, where the deployment in the path is the model: the same routes under them."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from kvist.server.openai import chat, completions, embeddings
from kvist.server.openai.chat_schema import ChatBody
from kvist.server.openai.completions_schema import CompletionBody, EmbeddingBody
from kvist.server.openai.replies import EmbeddingList

_PATH = "/openai/deployments/{deployment}"
Deployment = Annotated[str, Path(max_length=256)]


def add_azure(
    routes: APIRouter, answer_chat: chat.Route, continue_text: completions.Route, embed: embeddings.Route
) -> None:
    """Add the routes, which hand on to those given and are described there. Any `api-version` is taken."""

    @routes.post(f"{_PATH}/chat/completions", response_model=None, include_in_schema=False)
    async def deployed_chat(deployment: Deployment, body: ChatBody, request: Request) -> Response:
        return await answer_chat(body.model_copy(update={"model": deployment}), request)

    @routes.post(f"{_PATH}/completions", response_model=None, include_in_schema=False)
    async def deployed_completions(deployment: Deployment, body: CompletionBody, request: Request) -> Response:
        return await continue_text(body.model_copy(update={"model": deployment}), request)

    @routes.post(f"{_PATH}/embeddings", response_model=None, include_in_schema=False)
    async def deployed_embeddings(deployment: Deployment, body: EmbeddingBody, request: Request) -> EmbeddingList:
        return await embed(body.model_copy(update={"model": deployment}), request)
