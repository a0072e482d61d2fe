"""A model in this process that answers `kvist chat`."""

import asyncio
import secrets

from kvist.cli.chat_sources import Answer, Message, Show, Wish
from kvist.runtime.request import FinishReason
from kvist.service.chat import Chat, ChatRequest, Options
from kvist.service.loaded import Loaded
from kvist.service.sampling import Proposed
from kvist.service.serving import Serving
from kvist.text.response import Content, Reasoning


class Local:
    """A model in this process, on an event loop of its own."""

    def __init__(self, serving: Serving) -> None:
        self.name = serving.name
        self.sampled = str(serving.proposed)
        self._serving = serving
        self._runner = asyncio.Runner()
        self._chat = Chat(serving)

    def __enter__(self) -> "Local":
        self._runner.__enter__()
        self._runner.run(self._start())
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._runner.run(self._serving.stop(0))
        self._runner.close()

    def ask(self, messages: list[Message], wish: Wish, answer: Answer, show: Show) -> None:
        self._runner.run(self._ask(messages, wish, answer, show))

    async def _start(self) -> None:
        self._serving.start()

    async def _ask(self, messages: list[Message], wish: Wish, answer: Answer, show: Show) -> None:
        seed = secrets.randbits(32) if wish.seed is None else wish.seed
        sampling = Proposed(temperature=wish.temperature).over(self._serving.proposed).sampling(seed)
        session = self._chat.start(ChatRequest(tuple(messages), Options(wish.max_tokens, sampling)))
        try:
            async for delta in session:
                if delta.error is not None:
                    raise delta.error
                for part in delta.parts:
                    if isinstance(part, Content | Reasoning):
                        answer.push(part.text, isinstance(part, Reasoning))
                        show(part.text, isinstance(part, Reasoning))
                if delta.finish is not None:
                    answer.finish = "length" if delta.finish is FinishReason.LENGTH else "stop"
        finally:
            session.cancel()
            answer.prompt_tokens = session.session.prompt_tokens
            answer.cached_tokens = session.session.cached_tokens
            answer.new_tokens = session.session.new_tokens


def local(loaded: Loaded) -> Local:
    """A model whose cache holds one conversation of the whole context, where half of the free memory does."""
    return Local(Serving(loaded, loaded.engine(loaded.budget(running=1))))
