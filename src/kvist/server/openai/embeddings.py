"""`POST /v1/embeddings`: texts or token ids as vectors, the mean of the model's last hidden states at unit length."""

import base64
import sys
from array import array
from collections.abc import Awaitable, Callable, Iterator

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.server.errors import ApiError
from kvist.server.limits import tenant_of
from kvist.server.openai.completions import read_prompts
from kvist.server.openai.completions_schema import EmbeddingBody
from kvist.server.openai.models import served
from kvist.server.openai.replies import Embedding, EmbeddingList, EmbeddingUsage, answers, reply_with
from kvist.service.serving import Serving

Route = Callable[[EmbeddingBody, Request], Awaitable[Response]]


def add_embeddings(routes: APIRouter, serving: Serving) -> Route:
    """Add the route, and return what answers it."""

    @routes.post("/v1/embeddings", response_model=None, responses=answers(EmbeddingList))
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        asked_of = served(serving, body.model)
        tenant = tenant_of(request)
        prompts = [prompt.tokens for prompt in await read_prompts(body.input, serving, tenant)]
        vectors = await serving.embed(prompts, tenant, asked_of.adapter)
        if body.dimensions is not None and body.dimensions != len(vectors[0]):
            text = f"dimensions: this model's vectors have {len(vectors[0]):,}, and cannot be cut"
            raise ApiError(400, text, param="dimensions")
        data: Iterator[Embedding] = (
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format == "base64")}
            for index, vector in enumerate(vectors)
        )
        tokens = sum(map(len, prompts))
        usage: EmbeddingUsage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return await reply_with({"object": "list", "model": asked_of.name, "usage": usage}, "data", data)

    return embeddings


def _encoded(vector: list[float], as_base64: bool) -> list[float] | str:
    """As numbers, or as the base64 of little-endian float32."""
    if not as_base64:
        return vector
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
