"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM and llama.cpp have them: what a text is to the model,
without running it. vLLM's clients send `prompt`, llama.cpp's `content`, and each is answered in its own fields."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from kvist.base.errors import RequestError
from kvist.server.errors import RESPONSES
from kvist.server.limits import tenant_of
from kvist.service.serving import Serving
from kvist.text.chat import tokenizer_config

_MOST_TEXT = 1 << 20
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenize(BaseModel):
    """A text, as `prompt` or as `content`. Special tokens are added before it by default to a prompt alone."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool = Field(True, description="With prompt.")
    return_token_strs: bool = Field(False, description="With prompt.")
    add_special: bool = Field(False, description="With content.")
    with_pieces: bool = Field(False, description="With content.")

    @model_validator(mode="after")
    def _check_text(self) -> "Tokenize":
        if (self.prompt is None) == (self.content is None):
            raise PydanticCustomError("text", "a text is given as prompt or as content")
        return self


class Tokens(BaseModel):
    """The ids of a prompt, and where it was asked for each one's spelling in the vocabulary."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None = None


class Piece(BaseModel):
    """A token and its text; its bytes, where these are no text."""

    id: int
    piece: str | list[int]


class Pieces(BaseModel):
    """The ids of a content, or its pieces where they were asked for."""

    tokens: list[int] | list[Piece]


class Detokenize(BaseModel):
    """Token ids; those that the vocabulary lacks give no text."""

    model: str | None = None
    tokens: list[TokenId]


class Text(BaseModel):
    """What ids spell, special tokens included, under the names that vLLM and llama.cpp have for it."""

    prompt: str
    content: str


class TokenizerInfo(BaseModel):
    """What tokenizer_config.json says of it, as far as it is known there, and what the server does."""

    tokenizer_class: str | None
    vocab_size: int
    model_max_length: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    eos_token_ids: list[int]


def router(serving: Serving) -> APIRouter:
    """The routes. They work beside the event loop, as a long text takes a while."""
    routes = APIRouter(tags=["Kvist"], responses=RESPONSES)
    tokenizer = serving.tokenizer
    info = _info(serving)

    def tokenized(body: Tokenize) -> Response:
        found: Tokens | Pieces
        if body.content is not None:
            ids = tokenizer.encode(body.content, body.add_special)
            found = Pieces(tokens=[_piece(index) for index in ids] if body.with_pieces else ids)
        else:
            ids = tokenizer.encode(body.prompt or "", body.add_special_tokens)
            spelled = [tokenizer.token(index) for index in ids] if body.return_token_strs else None
            found = Tokens(count=len(ids), max_model_len=serving.context, tokens=ids, token_strs=spelled)
        return Response(found.model_dump_json(), media_type="application/json")

    @routes.post("/tokenize", response_model=Tokens | Pieces)
    async def tokenize(body: Tokenize, request: Request) -> Response:
        if len(body.prompt or body.content or "") > _MOST_TEXT:
            raise RequestError(f"prompt: a text of at most {_MOST_TEXT} characters is tokenized at once")
        return await serving.aside.run(tenant_of(request), lambda: tokenized(body))

    def _piece(token: int) -> Piece:
        raw = tokenizer.token_bytes(token)
        try:
            return Piece(id=token, piece=raw.decode())
        except UnicodeDecodeError:
            return Piece(id=token, piece=list(raw))

    @routes.post("/detokenize")
    async def detokenize(body: Detokenize, request: Request) -> Text:
        text = await serving.aside.run(tenant_of(request), lambda: tokenizer.decode(body.tokens, skip_special=False))
        return Text(prompt=text, content=text)

    @routes.get("/tokenizer_info")
    def tokenizer_info() -> TokenizerInfo:
        return info

    return routes


def _info(serving: Serving) -> TokenizerInfo:
    config = tokenizer_config(serving.loaded.directory)
    kind = config.get("tokenizer_class")
    end = min(serving.tokenizer.eos_ids, default=None)
    named: dict[str, Any] = {name: _content(config.get(name)) for name in _NAMED}
    if named["eos_token"] is None and end is not None:
        named["eos_token"] = serving.tokenizer.token(end)
    return TokenizerInfo(
        tokenizer_class=kind if isinstance(kind, str) else None,
        vocab_size=serving.tokenizer.vocab_size,
        model_max_length=serving.context,
        chat_template=None if serving.template is None else serving.template.source,
        eos_token_ids=sorted(serving.tokenizer.eos_ids),
        **named,
    )


def _content(token: Any) -> str | None:
    """A special token's text, which is a string there or an object with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
