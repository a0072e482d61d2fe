"""`POST /v1/rerank`: documents in the order of how near they are to a query, in the fields that Cohere, Jina, vLLM and
llama.cpp share. A score is the cosine of two embeddings (`embeddings.py`), from -1 to 1: a decoder that was trained for
nothing else says no more. What a model was trained as a reranker for is asked in its own words through a chat."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NotRequired

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from kvist.server.limits import tenant_of
from kvist.server.openai.body import Body, Count, Fields
from kvist.server.openai.completions import read_prompts
from kvist.server.openai.models import served
from kvist.server.openai.replies import EmbeddingUsage, answers, new_id
from kvist.service.serving import Serving

_MOST_DOCUMENTS = 1024
_PATH = "/v1/rerank"
_ALIASES = ("/rerank", "/v2/rerank")


class Document(Fields):
    text: str


def _document_kind(document: Any) -> str:
    return "text" if isinstance(document, str) else "object"


class RerankBody(Body):
    refused: ClassVar = {
        "max_chunks_per_doc": "a document is read whole",
        "max_tokens_per_doc": "a document is read whole; shorten it yourself",
        "truncate_prompt_tokens": "a document is read whole; shorten it yourself",
    }

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[
        list[
            Annotated[Annotated[str, Tag("text")] | Annotated[Document, Tag("object")], Discriminator(_document_kind)]
        ],
        Field(min_length=1, max_length=_MOST_DOCUMENTS),
    ]
    top_n: Count | None = Field(None, description="All by default.")
    return_documents: bool | None = Field(None, description="False by default.")


class Text(TypedDict):
    text: str


class Ranked(TypedDict):
    index: int
    relevance_score: float
    document: NotRequired[Text]


class Ranking(TypedDict):
    id: str
    object: str
    model: str
    results: list[Ranked]
    usage: EmbeddingUsage


def add_rerank(routes: APIRouter, serving: Serving) -> None:
    """Add the route, under each of the paths that clients know it by."""

    async def rerank(body: RerankBody, request: Request) -> Ranking:
        asked_of = served(serving, body.model)
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        tenant = tenant_of(request)
        prompts = [prompt.tokens for prompt in await read_prompts([body.query, *texts], serving, tenant)]
        query, *vectors = await serving.embed(prompts, tenant, asked_of.adapter)
        scores = await serving.aside.run(tenant, lambda: [_dot(query, vector) for vector in vectors])
        # The more similar first; of equal ones, the one that was given first.
        order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
        results: list[Ranked] = [{"index": index, "relevance_score": scores[index]} for index in order]
        for result in results if body.return_documents else ():
            result["document"] = {"text": texts[result["index"]]}
        tokens = sum(map(len, prompts))
        usage: EmbeddingUsage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": new_id("rerank-"), "object": "list", "model": asked_of.name, "results": results, "usage": usage}

    for path in (_PATH, *_ALIASES):
        described = path == _PATH
        routes.post(path, response_model=None, responses=answers(Ranking), include_in_schema=described)(rerank)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
