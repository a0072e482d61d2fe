"""The bundled model chats in the form that it knows: a dialogue in a play."""

import asyncio

import pytest

from kvist.base.errors import RequestError
from kvist.runtime.request import FinishReason, Sampling
from kvist.service.chat import Chat, ChatDelta, ChatRequest, Options, Tool, ToolChoice
from kvist.service.loaded import open_model
from kvist.service.serving import Serving
from kvist.service.session import Job
from kvist.text.response import Content

TALK = (
    {"role": "system", "content": "A street in Verona."},
    {"role": "user", "content": "Good morrow, cousin."},
    {"role": "assistant", "content": "Is the day so young?"},
    {"role": "user", "content": "But new struck nine."},
)
OPTIONS = Options(max_tokens=400, sampling=Sampling(temperature=0.7, seed=1))


@pytest.fixture(scope="module")
def serving() -> Serving:
    """Not started until it is asked."""
    loaded = open_model(None)
    return Serving(loaded, loaded.engine(loaded.budget(running=1)))


def test_a_conversation_is_a_play(serving: Serving) -> None:
    assert serving.template is not None
    play = (
        "A street in Verona.\n\nFRIAR LAURENCE:\nGood morrow, cousin.\n\nROMEO:\nIs the day so young?\n\n"
        "FRIAR LAURENCE:\nBut new struck nine.\n\nROMEO:\n"
    )
    assert serving.template.render(TALK) == play
    assert serving.template.render(TALK[:3], continue_final=True) == play[: play.index("?") + 1]
    assert Chat(serving).count(ChatRequest(TALK, OPTIONS)) == len(play), "each character is a token"
    assert (serving.format.name, serving.template.stops) == ("plain", ("\n\n",))


def test_what_it_does_not_know_is_refused_in_words(serving: Serving) -> None:
    tools = (Tool("look_up", None, {}),)
    with pytest.raises(RequestError, match="its vocabulary is 65 characters, and '\"'"):
        Chat(serving).start(ChatRequest(TALK, OPTIONS, tools=tools, tool_choice=ToolChoice.REQUIRED))
    with pytest.raises(RequestError, match="cannot write JSON of this schema"):
        Chat(serving).start(ChatRequest(TALK, OPTIONS, schema={}))


def test_characters_that_it_does_not_know_are_replaced(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(serving, "submit", jobs.append)
    Chat(serving).start(ChatRequest(({"role": "user", "content": "What is 2 and 2, {friend}?"},), OPTIONS))
    assert "What is ? and ?, ?friend??" in serving.tokenizer.decode(list(jobs[0].request.prompt))
    assert jobs[0].warnings == ("this model's vocabulary is 65 characters; others were replaced: '2' '{' '}'",)
    Chat(serving).start(ChatRequest(TALK, OPTIONS))
    assert jobs[1].warnings == ()


def test_an_answer_ends_where_another_would_speak(serving: Serving) -> None:
    async def ask(request: ChatRequest) -> list[ChatDelta]:
        serving.start()
        try:
            return [delta async for delta in Chat(serving).start(request)]
        finally:
            await serving.stop(0)

    deltas = asyncio.run(ask(ChatRequest(TALK, OPTIONS)))
    text = "".join(part.text for delta in deltas for part in delta.parts if isinstance(part, Content))
    assert (deltas[-1].finish, deltas[-1].stop) == (FinishReason.STOP, "\n\n")
    assert len(text.split()) > 3
    assert "\n\n" not in text
