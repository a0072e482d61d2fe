"""The bodies of `/v1/completions` and `/v1/embeddings`, which take text or token ids."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from kvist.server.openai.body import (
    INERT_EXTENSIONS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    Body,
    Integer,
    StreamOptions,
    TokenIds,
)
from kvist.server.openai.guided import Guided

MOST_PROMPTS = 256
_MOST_INPUTS = 2048
_MOST_TOKENS = 4_000_000


def prompt_kind(prompt: Any) -> str:
    """Which of the four forms of a prompt is meant, by its first element."""
    if isinstance(prompt, str):
        return "text"
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if isinstance(first, list):
        return "lists"
    return "tokens" if isinstance(first, int | float) else "texts"


Tokens = Annotated[TokenIds, Field(min_length=1, max_length=_MOST_TOKENS)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS), Tag("lists")],
    Discriminator(prompt_kind),
]
Input = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1, max_length=_MOST_INPUTS), Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[list[Tokens], Field(min_length=1, max_length=_MOST_INPUTS), Tag("lists")],
    Discriminator(prompt_kind),
]


class CompletionBody(Guided):
    refused: ClassVar = {
        **Guided.refused,
        "suffix": "models here continue a text and do not fill gaps in one",
        "response_format": "use guided_json, or /v1/chat/completions",
    }
    inert: ClassVar = {**INERT_EXTENSIONS, "response_format": ({"type": "text"},)}

    prompt: Prompt
    max_tokens: Annotated[Integer, Field(ge=0, lt=2**31)] | None = Field(
        None, description="16 by default, as OpenAI has it. 0 goes with echo."
    )
    n: Annotated[Integer, Field(ge=1, le=MOST_CHOICES)] | None = None
    best_of: Annotated[Integer, Field(ge=1, le=MOST_CHOICES)] | None = Field(None, description="As many as n.")
    echo: bool | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(None, description="Also the ids of the new tokens, as vLLM names it.")


class EmbeddingBody(Body):
    refused: ClassVar = {"truncate_prompt_tokens": "a text is read whole; shorten it yourself"}

    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Integer, Field(ge=1, lt=2**31)] | None = Field(
        None, description="As many as the model has; they cannot be fewer."
    )
