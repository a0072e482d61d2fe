"""`/tokenize` and `/detokenize`, as vLLM has them: what a text is to the model, without running it."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, Field

from kvist.server.errors import RESPONSES
from kvist.service.serving import Serving

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
    """The two routes. They work on threads of their own, as a long text takes a while."""
    routes = APIRouter(tags=["Kvist"], responses=RESPONSES)

    @routes.post("/tokenize")
    def tokenize(body: Tokenize) -> Tokens:
        ids = serving.tokenizer.encode(body.prompt, body.add_special_tokens)
        spelled = [serving.tokenizer.token(index) for index in ids] if body.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=serving.context, tokens=ids, token_strs=spelled)

    @routes.post("/detokenize")
    def detokenize(body: Detokenize) -> Text:
        return Text(prompt=serving.tokenizer.decode(body.tokens, skip_special=False))

    return routes
