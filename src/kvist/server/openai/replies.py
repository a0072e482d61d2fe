"""The shapes of answers, as OpenAI's types name their fields: what is sent is built of these, and the served schema
shows them. Those of the Responses API stand in `response_shapes.py`."""

import asyncio
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NotRequired

from fastapi.responses import Response
from typing_extensions import TypedDict

from kvist.base.version import __version__
from kvist.cache.layout import BLOCK_SIZE
from kvist.service.session import PrefillProgress, Session

FINGERPRINT = f"kvist-{__version__}"  # with the same seed and model, answers are the same as long as this is

# ASCII only: whatever a client's own words hold, they can be sent back.
encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_STREAM = {"text/event-stream": {"schema": {"description": "Server-sent events, where stream is true."}}}


def answers(shape: Any, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route whose answer has a shape."""
    return {200: {"model": shape, "content": _STREAM} if streams else {"model": shape}}


def reply(data: Mapping[str, Any]) -> Response:
    """The response that carries an answer."""
    return Response(encode(data), media_type="application/json")


async def reply_with(data: Mapping[str, Any], name: str, items: Iterable[Any]) -> Response:
    """As `reply`, with a list under `name` that may be long: between two of its items others have their turn."""
    written = []
    for item in items:
        written.append(encode(item))
        await asyncio.sleep(0)
    return Response(f"{encode(data)[:-1]},{encode(name)}:[{','.join(written)}]}}", media_type="application/json")


def new_id(kind: str) -> str:
    """`chatcmpl-` and 24 random hexadecimal digits."""
    return f"{kind}{secrets.token_hex(12)}"


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class CacheNote(TypedDict):
    """What the cache did for an answer; `GET /v1/cache/explain/{id}` says more. `cached`: tokens by tier; `again`:
    tokens that were computed although an earlier request had them, None where that is not known. `warnings`: what of
    the request was understood in another way, or is left to the client."""

    cached: dict[str, int]
    computed: int
    reason: str
    where: str | None
    again: int | None
    again_seconds: float | None
    warnings: NotRequired[list[str]]


class Noted(TypedDict):
    """What an answer carries of Kvist's own."""

    kvist: NotRequired[CacheNote]


def noted_cache(sessions: Sequence[Session]) -> Noted:
    """The note of the first session that has one: empty before its answer is complete."""
    found = next((session.explanation for session in sessions if session.explanation is not None), None)
    if found is None:
        return {}
    note: CacheNote = found.short()
    if warnings := list(dict.fromkeys(warning for session in sessions for warning in session.warnings)):
        note["warnings"] = warnings
    return {"kvist": note}


class PromptProgress(TypedDict):
    """How far a prompt is computed, in tokens: as llama.cpp tells it."""

    total: int
    cache: int
    processed: int
    time_ms: int


class WithProgress(TypedDict):
    prompt_progress: PromptProgress


def shown_progress(progress: PrefillProgress) -> WithProgress:
    """What an event of a stream says beside an empty choice."""
    time_ms = round(1000 * progress.seconds)
    told: PromptProgress = {
        "total": progress.total,
        "cache": progress.cached,
        "processed": progress.processed,
        "time_ms": time_ms,
    }
    return {"prompt_progress": told}


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


def usage_of(sessions: Sequence[Session], reasoning: int | None = None) -> Usage:
    """Tokens of all sessions together. `cached_tokens` are those of the prompt that were read from the cache."""
    prompt, new = (sum(session.prompt_tokens for session in sessions), sum(session.new_tokens for session in sessions))
    usage: Usage = {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(session.cached_tokens for session in sessions)},
    }
    if reasoning is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return usage


def left_in_cache(session: Session, first: int | None = None) -> int:
    """Of the `first` tokens of the prompt, or of all: how many this request computed and left in the cache, in whole
    blocks. At least the last token of a prompt is computed anew each time."""
    prompt = session.prompt_tokens
    asked = prompt if first is None else min(first, prompt)
    return max(min(asked // BLOCK_SIZE * BLOCK_SIZE, prompt - 1) - session.cached_tokens, 0)


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    function_call: NotRequired[FunctionCall]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Noted):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class LegacyLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str | None
    token_ids: NotRequired[list[int]]


class TextCompletion(Noted):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    sampling: dict[str, float]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class ModelInfo(TypedDict):
    """A model as Anthropic describes it."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class ModelPage(TypedDict):
    """A list of models as Anthropic has it."""

    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
