"""A model to ask, as a value of a program."""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar, overload

from torch import Tensor

from kvist.base.errors import Closed
from kvist.base.progress import Watch, is_watched, progress
from kvist.library.asking import MAX_TOKENS, Message, Prompt, is_one
from kvist.library.async_llm import AsyncLLM
from kvist.library.opening import Bytes
from kvist.library.results import Answer, ChatDelta, Completion, Score, TextDelta
from kvist.library.views import Cache, Contexts
from kvist.runtime.request import Sampling
from kvist.service.chat import Tool

T = TypeVar("T")

_NONE: Mapping[str, str] = {}


class LLM:
    """A model in this process, with its cache.

        with kvist.LLM("my-model", kv="turbo4") as llm:
            answers = llm.generate(["Hello", "Once upon a time"], kvist.Sampling(temperature=0.8), max_tokens=100)

    `model`: a directory, a GGUF file or a hub id; without one the bundled model. `kv`, `weights`, `dtype`,
    `activations`, `adapter` (merged) and `adapters` (asked for by name): as the command line has them. `memory`: bytes
    for the cache, as a number or "2GiB"; by default half of what is free. `cache_disk`: bytes of disk that computed
    prompts may take beyond this process, in `cache_dir` or in one folder for all models. `threads`: of the processor.

    Prompts that begin alike share what is computed, by themselves; `cache` shows it. May be used from several threads
    at once. Ctrl-C ends what is asked, and leaves the rest as it is. Raises `KvistError`s, of which `Closed` says that
    it was closed, or made in another process.
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
        self._process = os.getpid()
        self._llm = AsyncLLM(
            model,
            kv=kv,
            weights=weights,
            dtype=dtype,
            activations=activations,
            adapter=adapter,
            adapters=adapters,
            memory=memory,
            threads=threads,
            cache_disk=cache_disk,
            cache_dir=cache_dir,
        )
        self.name = self._llm.name
        self.context = self._llm.context
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="kvist-library", daemon=True)
        self._thread.start()
        self._run(self._llm.__aenter__)
        self.cache = Cache(self._llm.cache, self._run)
        self.contexts = Contexts(self._llm.contexts, self._run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way, and everything that this has started. Closing twice changes nothing."""
        loop, self._loop = self._loop, None
        if loop is None or self._process != os.getpid():
            return
        closed = Future[None]()
        loop.call_soon_threadsafe(_begin, self._llm.close, closed)
        closed.result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()

    # ---- texts

    @overload
    def generate(
        self,
        prompts: str,
        sampling: Sampling | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        adapter: str | None = None,
        context: str | None = None,
        show_progress: bool | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Any],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        adapter: str | None = None,
        context: str | None = None,
        show_progress: bool | None = None,
    ) -> Any: ...

    def generate(
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
        show_progress: bool | None = None,
    ) -> Any:
        """How each prompt goes on, in order: a `Completion` for one prompt, a list for several. They are computed
        together.

        A prompt is a text, token ids, or a conversation for the model's chat template. `sampling`: one, or one for each
        prompt; by default what the model's makers propose, or else the likeliest token each time. `stop`: end before
        these texts. `logprobs`: of how many of the likeliest tokens they are wanted beside each new one's. `schema`:
        the text is JSON that follows it; `regex`: all of the text is matched. `adapter`: the name of one of `adapters`.
        `context`: the name of one of `contexts`, with which the prompts begin. `show_progress`: by default for several
        prompts on a terminal or in a notebook.

        Raises `RequestError` for what can never run (`PromptTooLong` among them), and ends the others.
        """
        with _watching(not is_one(prompts) if show_progress is None else show_progress) as watch:
            return self._run(
                self._llm.generate,
                prompts,
                sampling,
                max_tokens=max_tokens,
                stop=stop,
                logprobs=logprobs,
                schema=schema,
                regex=regex,
                adapter=adapter,
                context=context,
                watch=watch,
            )

    def stream(
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
    ) -> Iterator[TextDelta]:
        """How one prompt goes on, as it comes; the last delta has the whole `completion`. Arguments as for `generate`.
        Whoever stops reading ends it."""
        return self._stream(
            lambda: self._llm.stream(
                prompt,
                sampling,
                max_tokens=max_tokens,
                stop=stop,
                logprobs=logprobs,
                schema=schema,
                regex=regex,
                adapter=adapter,
                context=context,
            )
        )

    # ---- conversations

    def chat(
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
        """The answer to a conversation: text, reasoning and calls apart. `tools`: functions as OpenAI's API has them.
        `tool_choice`: auto, none, required, or the name of one that must be called. `schema`: the text is JSON that
        follows it; `{}`: any object. `max_tokens`: by default as many as the context leaves room for."""
        return self._run(
            self._llm.chat,
            messages,
            sampling,
            tools=tools,
            tool_choice=tool_choice,
            schema=schema,
            max_tokens=max_tokens,
            stop=stop,
            logprobs=logprobs,
            adapter=adapter,
            context=context,
        )

    def stream_chat(
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
    ) -> Iterator[ChatDelta]:
        """The same as it comes; the last delta has the whole `answer`."""
        return self._stream(
            lambda: self._llm.stream_chat(
                messages,
                sampling,
                tools=tools,
                tool_choice=tool_choice,
                schema=schema,
                max_tokens=max_tokens,
                stop=stop,
                logprobs=logprobs,
                adapter=adapter,
                context=context,
            )
        )

    # ---- numbers

    def score(self, text: str | Sequence[int]) -> Score:
        """How likely the model finds a text, or token ids: of each token behind the first."""
        return self._run(self._llm.score, text)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """What the model predicts behind each of the tokens: `[tokens, vocabulary]` float32. They are computed anew
        through the cache, in steps as long as it allows, and nothing of them stays."""
        return self._run(self._llm.logits, tokens)

    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """The mean of each text's last hidden states at unit length: `[texts, hidden_size]` float32; `[hidden_size]`
        for one text."""
        return self._run(self._llm.embed, texts)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text. `special`: with the tokens that the model begins a text with. Raises `TextError`."""
        return self._llm.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._llm.detokenize(tokens)

    # ---- inside

    def _live(self) -> asyncio.AbstractEventLoop:
        self._llm.require_open()
        if self._loop is None:
            raise Closed("this LLM is closed; make another")
        return self._loop

    def _run(self, work: Callable[..., Coroutine[Any, Any, T]], *given: Any, **named: Any) -> T:
        """What it returns or raises on the loop of this LLM. Whoever is interrupted ends it."""
        loop, told = self._live(), Future[T]()
        # It is known before anything begins: an interrupt may come between any two steps of this thread.
        try:
            loop.call_soon_threadsafe(_begin, lambda: work(*given, **named), told)
            return told.result()
        except BaseException:
            told.cancel()
            raise

    def _stream(self, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        """What an iterator of the loop gives, begun when it is first read. Whoever stops reading ends it."""
        loop = self._live()
        arrived: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with contextlib.aclosing(make()) as deltas:  # type: ignore[type-var]
                    async for delta in deltas:
                        arrived.put((delta, None))
                arrived.put((None, StopIteration()))
            except BaseException as error:
                arrived.put((None, error))
                if not isinstance(error, Exception):
                    raise

        def read() -> Iterator[T]:
            told = Future[None]()
            try:
                loop.call_soon_threadsafe(_begin, pump, told)
                while True:
                    delta, error = arrived.get()
                    if isinstance(error, StopIteration):
                        return
                    if error is not None:
                        raise Closed("the answer was ended") if isinstance(error, asyncio.CancelledError) else error
                    assert delta is not None
                    yield delta
            finally:
                told.cancel()

        return read()


@contextlib.contextmanager
def _watching(wanted: bool) -> Iterator[Watch]:
    """Shows how many of several prompts are answered, where somebody can see it."""
    if wanted and is_watched():
        with progress("answering", "prompts") as watch:
            yield watch
    else:
        yield lambda done, total: None


def _begin(make: Callable[[], Coroutine[Any, Any, T]], told: "Future[T]") -> None:
    """On the loop: do something, and tell what comes of it; when nobody wants to be told any more, end it."""
    if told.cancelled():
        return
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(make())

    def ended(task: "asyncio.Task[T]") -> None:
        error = Closed("this LLM was closed") if task.cancelled() else task.exception()
        if not told.set_running_or_notify_cancel():
            return
        if error is None:
            told.set_result(task.result())
        else:
            told.set_exception(error)

    def given_up(told: "Future[T]") -> None:
        if told.cancelled():
            loop.call_soon_threadsafe(task.cancel)

    task.add_done_callback(ended)
    told.add_done_callback(given_up)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """The thread of an LLM."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
