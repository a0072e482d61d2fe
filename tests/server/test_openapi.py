"""The description at /openapi.json is what the server does: schemathesis sends what it allows, and what it does not."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from kvist.server.app import create_app
from kvist.server.settings import ServerSettings
from live import Live, live
from tiny_model import open_serving, write_tiny_model

ROUTES = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/embeddings",
    "GET /v1/models",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "GET /health",
    "GET /metrics",
}
GET_MODES = [GenerationMode.POSITIVE]
EXAMPLES = 20
CONTEXT = 256
# A body that the schema allows may still ask for what cannot be: more tokens than the context, a tool that is not
# given. So its refusal is no failure, as long as it is one that is described.


@pytest.fixture
def short_server(tmp_path: Path) -> Iterator[Live]:
    """Of a model with a short context: most of what is sent names no end, and is answered until there is no room."""
    serving, settings = open_serving(write_tiny_model(tmp_path / "tiny", CONTEXT)), ServerSettings()
    with live(create_app(serving, settings), serving, settings) as server:
        yield server


def test_every_route_answers_as_it_is_described(short_server: Live) -> None:
    api = schemathesis.openapi.from_url(f"{short_server.url}/openapi.json")
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.label for operation in operations} >= ROUTES
    statuses: Counter[int] = Counter()
    for operation in operations:
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if operation.method == "post" else GET_MODES
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis_settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
            def check(case: schemathesis.Case) -> None:
                response = case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])
                statuses[response.status_code] += 1

            check()
    assert statuses[200] > 50, statuses
    assert statuses[400] > 50, statuses
    assert max(statuses) < 500, statuses
