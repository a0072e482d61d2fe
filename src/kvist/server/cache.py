"""Questions about the cache: why a prompt was computed, and what a session pays. Each tenant asks about its own."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request

from kvist.server.errors import RESPONSES, ApiError
from kvist.server.limits import tenant_of
from kvist.service.serving import Serving
from kvist.service.tax import tax_of

Id = Annotated[str, Path(min_length=1, max_length=128)]


def router(serving: Serving) -> APIRouter:
    """`GET /v1/cache/explain/{id}` and `GET /v1/cache/tax`; what they answer is in docs/json.md."""
    routes = APIRouter(tags=["Kvist"], responses=RESPONSES)
    explainer = serving.explainer

    def count(text: str) -> int:
        return len(serving.tokenizer.encode(text, add_special=False))

    @routes.get("/v1/cache/explain/{id}")
    async def explain(id: Id, request: Request) -> dict[str, Any]:
        """Of an answer, by its id or that of its request."""
        found = explainer.told(tenant_of(request), id)
        if found is None:
            raise ApiError(
                404, "no answer of that id is remembered; the last thousand are, until a restart", code="not_found"
            )
        return found.to_json()

    @routes.get("/v1/cache/tax")
    async def tax(
        request: Request,
        session: Annotated[str | None, Query(max_length=256, description="A prompt_cache_key.")] = None,
    ) -> dict[str, Any]:
        """Of the requests of a session; without one, of those that the last request grew from."""
        found = explainer.session(tenant := tenant_of(request), session)
        if not found:
            raise ApiError(404, "no request of that session is remembered", code="not_found")
        # As many texts as a prompt has parts are tokenized.
        paid = await serving.aside.run(tenant, lambda: tax_of(found, count))
        return paid.to_json()

    return routes
