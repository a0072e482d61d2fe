"""A model to ask from an event loop, over the engine's thread that the server uses."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from kvist.base.errors import Closed, RequestError
from kvist.base.progress import Watch
from kvist.library.asking import (
    MAX_TOKENS,
    Gathered,
    Message,
    Prompt,
    check_form,
    choice_of,
    default_sampling,
    is_chat,
    is_one,
    prompt_job,
    tool_of,
)
from kvist.library.opening import Bytes, Wanted, open_serving
from kvist.library.results import Answer, ChatDelta, Completion, Score, TextDelta
from kvist.library.views import AsyncCache, AsyncContexts
from kvist.runtime.engine import Engine
from kvist.runtime.feed import feed
from kvist.runtime.request import Grammar, Sampling
from kvist.service.aside import LIGHT
from kvist.service.chat import Chat, ChatRequest, Options, Tool
from kvist.service.contexts import CHAT, Context
from kvist.service.loaded import Opening
from kvist.service.serving import Serving
from kvist.service.session import Job, Session

T = TypeVar("T")

_NONE: Mapping[str, str] = {}
_NAME = "answer-{}"  # under which explanations are asked for


class AsyncLLM:
    """As `LLM`, with methods to await. Open it where it is used:

        async with kvist.AsyncLLM("my-model") as llm:
            print((await llm.generate("Hello")).text)

    The model is read when it is made, which takes a while and stops the event loop meanwhile; `asyncio.to_thread` makes
    it elsewhere. Any number of tasks may ask at once; they are answered together.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        kv: str | None = None,
        weights: str | None = None,
        dtype: str | None = None,
        activations: str | None = None,
        adapter: str | None = None,
        adapters: Mapping[str, str] = _NONE,
        memory: Bytes | None = None,
        threads: int | None = None,
        cache_disk: Bytes | None = None,
        cache_dir: str | None = None,
    ) -> None:
        self._stack = contextlib.ExitStack()
        opening = Opening(model, dtype, kv, weights, activations, adapter)
        wanted = Wanted(opening, adapters, memory, threads, cache_disk, cache_dir)
        with contextlib.ExitStack() as stack:
            self._serving: Serving | None = open_serving(wanted, stack)
            self._stack = stack.pop_all()
        self._process = os.getpid()
        self._answers = 0
        self.name = self._serving.name
        self.context = self._serving.context
        self.cache = AsyncCache(self._open)
        self.contexts = AsyncContexts(self._open)

    # ---- opening and closing

    async def __aenter__(self) -> Self:
        self._open().start()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way, the engine's thread, and what it keeps. Closing twice changes nothing."""
        serving, self._serving = self._serving, None
        if serving is not None and self._process == os.getpid():
            await serving.stop(0)
            await asyncio.to_thread(self._stack.close)

    def require_open(self) -> None:
        """Raises `Closed` unless it can be asked in this process."""
        self._open()

    def _open(self) -> Serving:
        if self._process != os.getpid():
            raise Closed("this LLM belongs to the process that made it, and cannot be asked in this one; make another")
        if self._serving is None:
            raise Closed("this LLM is closed; make another")
        return self._serving

    # ---- texts

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        adapter: str | None = None,
        context: str | None = None,
        watch: Watch = lambda done, total: None,
    ) -> Any:
        """How each prompt goes on, in order: a `Completion` for one prompt, a list for several."""
        serving = self._open()
        one = is_one(prompts)
        many: list[Any] = [prompts] if one else list(prompts)
        samplings = self._samplings(sampling, len(many))
        grammar, begun = await self._grammar(serving, schema, regex), self.contexts.get(context)
        width, done = asyncio.Semaphore(2 * serving.most_running), 0

        async def answer(prompt: Prompt, sampled: Sampling) -> Completion:
            nonlocal done
            async with width:
                options = self._options(serving, sampled, max_tokens, stop, logprobs, adapter, streamed=False)
                session = await self._submit(serving, prompt, options, grammar, begun)
                async for delta in self._deltas(session):
                    if delta.completion is not None:
                        done += 1
                        watch(done, len(many))
                        return delta.completion
            raise Closed("the answer was ended")

        answers = await _together([answer(prompt, each) for prompt, each in zip(many, samplings, strict=True)])
        return answers[0] if one else answers

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        adapter: str | None = None,
        context: str | None = None,
    ) -> AsyncIterator[TextDelta]:
        """How one prompt goes on, as it comes; the last delta has the whole `completion`."""
        serving = self._open()
        grammar = await self._grammar(serving, schema, regex)
        sampled = default_sampling(serving) if sampling is None else sampling
        options = self._options(serving, sampled, max_tokens, stop, logprobs, adapter, streamed=True)
        session = await self._submit(serving, prompt, options, grammar, self.contexts.get(context))
        async for delta in self._deltas(session):
            yield delta

    # ---- conversations

    async def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        schema: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        adapter: str | None = None,
        context: str | None = None,
    ) -> Answer:
        """The answer to a conversation: text, reasoning and calls apart. `schema`: the text is JSON that follows it;
        `{}`: any object."""
        asked = self._chat_request(
            messages, sampling, tools, tool_choice, schema, max_tokens, stop, logprobs, adapter, context, streamed=False
        )
        async for delta in self._chat_deltas(asked):
            if delta.answer is not None:
                return delta.answer
        raise Closed("the answer was ended")

    async def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        schema: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        adapter: str | None = None,
        context: str | None = None,
    ) -> AsyncIterator[ChatDelta]:
        """The same as it comes; the last delta has the whole `answer`."""
        asked = self._chat_request(
            messages, sampling, tools, tool_choice, schema, max_tokens, stop, logprobs, adapter, context, streamed=True
        )
        async for delta in self._chat_deltas(asked):
            yield delta

    # ---- numbers

    async def score(self, text: str | Sequence[int]) -> Score:
        """How likely the model finds a text, or token ids: of each token behind the first."""
        serving = self._open()
        options = Options(0, Sampling(), prompt_logprobs=0, streamed=False)
        session = await self._submit(serving, text, options, None)
        async for _ in self._deltas(session):
            pass
        told = [entry.logprob for entry in session.prompt_logprobs if entry is not None]
        return Score(session.job.request.prompt, tuple(told))

    async def logits(self, tokens: Sequence[int]) -> Tensor:
        """What the model predicts behind each of the tokens: `[tokens, vocabulary]` float32. They are computed anew
        through the cache, in steps as long as it allows, and nothing of them stays."""
        ids = tuple(tokens)
        if not ids or not all(isinstance(token, int) for token in ids):
            raise RequestError("logits are those behind token ids, of which at least one is needed")
        return await self._open().call(lambda engine: _logits(engine, ids))

    async def embed(self, texts: str | Sequence[str]) -> Tensor:
        """The mean of each text's last hidden states at unit length: `[texts, hidden_size]` float32; `[hidden_size]`
        for one text."""
        serving = self._open()
        many = [texts] if isinstance(texts, str) else list(texts)
        prompts = [serving.tokenizer.encode(text) for text in many]
        vectors = torch.tensor(await serving.embed(prompts), dtype=torch.float32)
        return vectors[0] if isinstance(texts, str) else vectors

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text. `special`: with the tokens that the model begins a text with. Raises `TextError`."""
        return self._open().tokenizer.encode(text, special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._open().tokenizer.decode(list(tokens), skip_special=False)

    # ---- inside

    def _options(
        self,
        serving: Serving,
        sampling: Sampling,
        max_tokens: int | None,
        stop: Sequence[str],
        logprobs: int | None,
        adapter: str | None,
        *,
        streamed: bool,
    ) -> Options:
        if isinstance(stop, str):
            raise RequestError("stop is a list of texts; one alone is written ['...']")
        if adapter is not None and adapter not in serving.adapters:
            known = ", ".join(serving.adapters) or "none"
            raise RequestError(f"there is no adapter {adapter!r}; those that were opened: {known}")
        own = "" if adapter is None else serving.adapters[adapter]
        return Options(max_tokens, sampling, tuple(stop), logprobs=logprobs, adapter=own, streamed=streamed)

    def _samplings(self, sampling: Sampling | Sequence[Sampling] | None, count: int) -> list[Sampling]:
        if sampling is None or isinstance(sampling, Sampling):
            return [default_sampling(self._open()) if sampling is None else sampling] * count
        if len(sampling) != count:
            raise RequestError(f"there are {count} prompts and {len(sampling)} samplings: give one, or one for each")
        return list(sampling)

    async def _grammar(
        self, serving: Serving, schema: Mapping[str, Any] | None, regex: str | None
    ) -> Callable[[], Grammar] | None:
        if schema is not None and regex is not None:
            raise RequestError("a text follows a schema or a regular expression, not both")
        if schema is not None:
            make = serving.grammars.json_schema
            return await asyncio.to_thread(make, schema) if schema else serving.grammars.json_object()
        return None if regex is None else await asyncio.to_thread(serving.grammars.regex, regex)

    async def _submit(
        self,
        serving: Serving,
        prompt: Prompt,
        options: Options,
        grammar: Callable[[], Grammar] | None,
        context: Context | None = None,
    ) -> Session:
        def read() -> Job:
            return prompt_job(serving, prompt, options, grammar, context)

        light = not is_chat(prompt) and len(prompt) <= LIGHT
        session = serving.submit(read() if light else await asyncio.to_thread(read))
        self._name(session)
        return session

    def _name(self, session: Session) -> None:
        self._answers += 1
        session.name(_NAME.format(self._answers))
        self.cache.last = _NAME.format(self._answers)

    async def _deltas(self, session: Session) -> AsyncIterator[TextDelta]:
        gathered = Gathered()
        try:
            async for delta in session:
                if delta.error is not None:
                    raise delta.error
                gathered.texts.append(delta.text)
                gathered.tokens += delta.tokens
                whole = None if delta.finish_reason is None else gathered.completion(session, delta.finish_reason)
                yield TextDelta(delta.text, tuple(token.id for token in delta.tokens), whole)
        finally:
            session.cancel()

    def _chat_request(
        self,
        messages: Sequence[Message],
        sampling: Sampling | None,
        tools: Sequence[Tool | Mapping[str, Any]],
        tool_choice: str,
        schema: Mapping[str, Any] | None,
        max_tokens: int | None,
        stop: Sequence[str],
        logprobs: int | None,
        adapter: str | None,
        context: str | None,
        *,
        streamed: bool,
    ) -> ChatRequest:
        serving = self._open()
        if not is_chat(messages):
            raise RequestError("a conversation is a list of messages, as in [{'role': 'user', 'content': '...'}]")
        told = [tool_of(tool) for tool in tools]
        choice, name = choice_of(tool_choice, told)
        sampled = default_sampling(serving) if sampling is None else sampling
        options = self._options(serving, sampled, max_tokens, stop, logprobs, adapter, streamed=streamed)
        begun = self.contexts.get(context)
        if begun is not None:
            check_form(begun, CHAT)
        return ChatRequest(tuple(messages), options, tuple(told), choice, name, schema=schema, context=begun)

    async def _chat_deltas(self, asked: ChatRequest) -> AsyncIterator[ChatDelta]:
        session = await Chat(self._open()).ask(asked)
        self._name(session.session)
        gathered = Gathered()
        try:
            async for delta in session:
                if delta.error is not None:
                    raise delta.error
                text, reasoning = gathered.add(delta.parts)
                gathered.tokens += delta.tokens
                whole = None if delta.finish is None else gathered.answer(session.session, delta.finish)
                yield ChatDelta(text, reasoning, whole)
        finally:
            session.cancel()


def _logits(engine: Engine, tokens: tuple[int, ...]) -> Tensor:
    """On the engine's thread."""
    runner = engine.runner
    if len(tokens) > runner.model.config.max_positions:
        raise RequestError(f"{len(tokens):,} tokens are more than the context, {runner.model.config.max_positions:,}")
    if not 0 <= min(tokens) <= max(tokens) < runner.model.config.vocab_size:
        raise RequestError(f"a token id is outside the vocabulary of {runner.model.config.vocab_size:,}")
    lease = runner.manager.open("\0logits")
    try:
        return feed(runner, lease, tokens, len(tokens))
    finally:
        runner.manager.release(lease)


async def _together(answers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them, in order; when one fails, or whoever waits goes away, the others are ended."""
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
