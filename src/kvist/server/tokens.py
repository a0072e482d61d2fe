"""`/tokenize` and `/detokenize`, as vLLM has them: what a text is to the model, without running it."""

from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from kvist.base.errors import RequestError
from kvist.server.errors import RESPONSES
from kvist.server.limits import tenant_of
from kvist.service.serving import Serving

_MOST_TEXT = 1 << 20
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class Tokenize(BaseModel):
    """A text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Tokens(BaseModel):
    """The ids of a text, and where it was asked for each one's spelling in the vocabulary."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class Detokenize(BaseModel):
    """Token ids; those that the vocabulary lacks give no text."""

    model: str | None = None
    tokens: list[TokenId]


class Text(BaseModel):
    """What ids spell, special tokens included."""

    prompt: str


def router(serving: Serving) -> APIRouter:
    """The two routes. They work beside the event loop, as a long text takes a while."""
    routes = APIRouter(tags=["Kvist"], responses=RESPONSES)

    def tokenized(body: Tokenize) -> Response:
        ids = serving.tokenizer.encode(body.prompt, body.add_special_tokens)
        spelled = [serving.tokenizer.token(index) for index in ids] if body.return_token_strs else None
        tokens = Tokens(count=len(ids), max_model_len=serving.context, tokens=ids, token_strs=spelled)
        return Response(tokens.model_dump_json(), media_type="application/json")

    @routes.post("/tokenize", response_model=Tokens)
    async def tokenize(body: Tokenize, request: Request) -> Response:
        if len(body.prompt) > _MOST_TEXT:
            raise RequestError(f"prompt: a text of at most {_MOST_TEXT} characters is tokenized at once")
        return await serving.aside.run(tenant_of(request), lambda: tokenized(body))

    @routes.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> Text:
        return Text(
            prompt=await serving.aside.run(
                tenant_of(request), lambda: serving.tokenizer.decode(body.tokens, skip_special=False)
            )
        )

    return routes
