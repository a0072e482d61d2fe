"""Embeddings, as the official client reads them."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted_openai import MODEL, ScriptedServing, application, post, with_client

from kvist.server.openai.replies import reply_with
from kvist.server.settings import ServerSettings


def embed(serving: ScriptedServing, **fields: Any) -> Any:
    return with_client(application(serving=serving), lambda client: client.embeddings.create(model=MODEL, **fields))


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_vectors_in_both_encodings(form: str | None) -> None:
    """The client asks for base64 by itself and decodes it."""
    serving = ScriptedServing()
    answer = embed(serving, input=["Hi", "é!?"], **({} if form is None else {"encoding_format": form}))
    if form == "base64":
        assert answer.data[0].embedding == "mpkZP83MTL8AAABA"
        return
    first, second = (data.embedding for data in answer.data)
    assert first == pytest.approx([0.6, -0.8, 2.0], abs=1e-6)
    assert second == pytest.approx([0.6, -0.8, 4.0], abs=1e-6)
    assert [data.index for data in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (6, 6, MODEL)
    assert serving.embedded == [([[72, 105], [0xC3, 0xA9, 33, 63]], "")]


def test_tokens_and_the_tenant() -> None:
    serving = ScriptedServing()
    app = application(serving=serving, settings=ServerSettings(api_keys=("k",)))
    with_client(app, lambda client: client.embeddings.create(model=MODEL, input=[[1, 2], [3]], dimensions=3))
    ((prompts, tenant),) = serving.embedded
    assert prompts == [[1, 2], [3]]
    assert tenant


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(openai.BadRequestError, match="have 3") as caught:
        embed(ScriptedServing(), input="a", dimensions=2)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize("given", [[], [[]], None, {"a": 1}, 3, ["a", 3], ["a"] * 2049])
def test_inputs_that_are_none(given: Any) -> None:
    assert post(application(), "/v1/embeddings", {"input": given}).status_code == 400


def test_a_long_list_is_written_in_turns() -> None:
    async def main() -> tuple[dict[str, object], list[int]]:
        begun, seen = list[int](), list[int]()

        def items() -> Iterator[dict[str, object]]:
            for index in range(20):
                begun.append(index)
                yield {"index": index, "text": 'é"'}

        async def other() -> None:
            while len(begun) < 20:
                seen.append(len(begun))
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        answer = await reply_with({"object": "list", "n": 1}, "data", items())
        await task
        return json.loads(answer.body), seen

    answer, seen = asyncio.run(main())
    assert answer == {"object": "list", "n": 1, "data": [{"index": index, "text": 'é"'} for index in range(20)]}
    assert seen == list(range(1, 20)), "between two of them the other task had its turn"
