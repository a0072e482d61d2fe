"""The engine on a thread of its own, and the sessions that an event loop holds on it.

The event loop's thread hands over commands through a queue and never waits for a step; the engine's thread hands over
what a step drew with one call into the loop and never waits for a reader. A session keeps what its reader has not taken
yet, which is no more than its request may draw.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kvist.base.errors import KvistError, Overloaded, RequestError, Stopping
from kvist.base.units import plural
from kvist.cache.kept import KeptCache
from kvist.cache.manager import CacheManager
from kvist.runtime.engine import Drawn, Engine
from kvist.runtime.request import FinishReason, Request
from kvist.runtime.sequence import Sequence as Running
from kvist.service.aside import Aside
from kvist.service.contexts import chat_tokens
from kvist.service.explain import Explainer
from kvist.service.facts import Cause, ChoiceDone, FactListener, Load, Matched, RequestDone, StepDone
from kvist.service.keeping import Kept
from kvist.service.live_session import LiveSession
from kvist.service.loaded import Loaded
from kvist.service.sampling import read_proposed
from kvist.service.session import Delta, Job, NewToken, PrefillProgress
from kvist.service.shelf import Shelf
from kvist.service.tenants import Tenant
from kvist.service.text_stream import TextStream, stop_strings
from kvist.service.watch import Watch
from kvist.text.chat import ChatTemplate
from kvist.text.grammar import GrammarCompiler
from kvist.text.response import ResponseFormat

_log = logging.getLogger("kvist.serving")

T = TypeVar("T")

_WRITING = 0.05  # seconds between two looks at the writers, where nothing else is to be done
_FLUSH = 30.0  # seconds in which a shut-down writes what is not yet written of the cache


class Serving:
    """A model, its text side and its engine, which runs on a thread from `start` to `stop`.

    `strict_model`: no other name stands for it. `generic_tools`: a model whose chat template has no place for tools is
    told of them in words. `max_waiting`: requests that may wait before others are refused; `timeout`: seconds that one
    may take; `tenants`: those who have limits; `kept`: what the engine keeps on disk; `listener` hears facts on the
    engine's thread.
    """

    def __init__(
        self,
        loaded: Loaded,
        engine: Engine,
        *,
        name: str | None = None,
        strict_model: bool = False,
        template: Path | None = None,
        generic_tools: bool = True,
        max_waiting: int = 256,
        timeout: float = math.inf,
        tenants: Sequence[Tenant] = (),
        kept: Kept | None = None,
        listener: FactListener = lambda fact: None,
    ) -> None:
        self.name = name or loaded.name
        self.strict_model = strict_model
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer()
        self.template = ChatTemplate.load(loaded.directory, template)
        self.proposed = read_proposed(loaded.directory)  # how to sample where a request says nothing
        self.generic_tools = generic_tools
        self.format = ResponseFormat.detect(loaded.directory, self.template)
        self.grammars = GrammarCompiler(self.tokenizer, loaded.config.vocab_size)
        self.aside = Aside()
        self.adapters = dict(loaded.adapters)  # ids by the names that clients ask for
        self.created = int(time.time())
        self.listener = listener
        manager = engine.runner.manager
        # The last token drawn is never written, so a sequence may have one more than the cache holds.
        self.context = min(loaded.config.max_positions, manager.pool.capacity * manager.block_size)
        self.explainer = Explainer(lambda ids: self.tokenizer.decode(ids, skip_special=False), manager.block_size)
        self.shelf = None if kept is None or kept.folder is None else Shelf(self, kept)
        self._engine = engine
        self._max_waiting = max_waiting
        self._timeout = timeout
        self._limits = {tenant.id: tenant.requests for tenant in tenants if tenant.requests is not None}
        self._under_way: Counter[str] = Counter()  # requests, by tenant
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sessions: dict[Running, tuple[LiveSession, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ending = False  # set by the engine's thread, on command
        self.failure: BaseException | None = None
        self._stopping = False
        # Each is written by one thread only; their difference has been submitted and not yet taken over.
        self._submitted = 0
        self._taken = 0
        self._step_seconds = 0.05
        self._watch = Watch()

    # ---- the event loop's side

    def start(self) -> None:
        """Start the engine's thread. Call it on the event loop that sessions will be read on."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="kvist-engine", daemon=True)
        self._thread.start()

    async def stop(self, grace: float) -> None:
        """Refuse what waits and what comes (`Stopping`), let what runs go on for at most `grace` seconds, then end it
        and the thread."""
        self._stopping = True
        self.aside.close()
        if self._thread is None:
            return
        self._commands.put(self._refuse_waiting)
        end = time.perf_counter() + grace
        while not self._engine.idle and self.alive and time.perf_counter() < end:
            await asyncio.sleep(0.02)
        self._commands.put(self._end_all)
        await asyncio.to_thread(self._thread.join)
        with contextlib.suppress(queue.Empty):  # whoever came at the very end is told, too
            while True:
                self._commands.get_nowait()()
        # The engine's thread has ended, so what was computed and is not yet written may be handed over from here.
        if self.failure is None and not await asyncio.to_thread(self._engine.keeper.flush, _FLUSH):
            _log.warning("part of the cache was not written within %g s; it will be computed again", _FLUSH)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs, and can."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    @property
    def trouble(self) -> str | None:
        """Why nothing can be expected of the engine, in a line; None while it runs, and gets on with what it has."""
        return self._watch.trouble() if self.alive else "the engine does not run; the log says why"

    def submit(self, job: Job) -> LiveSession:
        """Queue a job. Raises `RequestError` for one that can never run, `Overloaded` when too many wait,
        `Stopping`."""
        self._check_job(job)
        self._check_room(job.request.tenant)
        return self._queue(job)

    def _check_job(self, job: Job) -> None:
        """Raises for a job that can never run, or no more."""
        if self._stopping or not self.alive:
            raise Stopping("the server is shutting down" if self._stopping else "the engine has failed; see the log")
        if not 1 <= job.choices <= self._engine.scheduler.most_running:
            raise RequestError(
                f"between 1 and {self._engine.scheduler.most_running} choices can be had at once, not {job.choices}"
            )
        self._engine.check_request(job.request)

    def _check_room(self, tenant: str, jobs: int = 1) -> None:
        """Raises `Overloaded` where so many more of a tenant's have no place."""
        if self._under_way[tenant] + jobs > self._limits.get(tenant, math.inf):
            raise Overloaded(
                f"{plural(self._under_way[tenant], 'request')} of yours are under way already, as many as may be; try "
                "again when one has ended",
                retry_after=1,
            )
        waiting = self._waiting
        if waiting + jobs > self._max_waiting:
            raise Overloaded(
                f"{plural(waiting, 'request')} wait already, as many as this server allows; try again later",
                retry_after=min(60, max(1, math.ceil(waiting * self._step_seconds))),
            )

    def _queue(self, job: Job) -> LiveSession:
        session, tenant = LiveSession(self, job), job.request.tenant
        if math.isfinite(self._timeout):
            session.expire_after(self._timeout)
        self._submitted += 1
        self._under_way[tenant] += 1
        self._commands.put(lambda: self._begin(session))
        return session

    def end(self, session: LiveSession, error: KvistError | None = None) -> None:
        """End what has not ended of a session, because nobody wants it any more or because of `error`. From any
        thread."""
        self._commands.put(lambda: self._end(session, error))

    def note_ended(self, session: LiveSession) -> None:
        """On the event loop's thread: nothing more of a session will come."""
        tenant = session.job.request.tenant
        self._under_way[tenant] -= 1
        if not self._under_way[tenant]:
            del self._under_way[tenant]

    async def embed(self, prompts: Sequence[Sequence[int]], tenant: str = "", adapter: str = "") -> list[list[float]]:
        """The mean of each prompt's last hidden states, scaled to unit length.

        All of them are let in, or none. No more have a place than can run at once; each leaves its own to the next.
        """
        jobs = [Job(Request(tuple(prompt), 0, pooled=True, tenant=tenant, adapter=adapter)) for prompt in prompts]
        for job in jobs:
            self._check_job(job)
        width = min(len(jobs), self._engine.scheduler.most_running, self._limits.get(tenant, len(jobs)))
        self._check_room(tenant, width)
        vectors, under_way = list[list[float]](), deque[LiveSession]()
        try:
            for job in jobs:
                if len(under_way) == width:
                    vectors.append(await self._embedding(under_way.popleft()))
                self._check_job(job)  # the server may be stopping by now
                under_way.append(self._queue(job))
            while under_way:
                vectors.append(await self._embedding(under_way.popleft()))
            return vectors
        finally:
            for session in under_way:
                session.cancel()

    async def check(self) -> None:
        """Raises `InvariantError` unless the engine and the cache are consistent. Looks between two steps."""
        await self.call(Engine.check)

    async def call(self, work: Callable[[Engine], T]) -> T:
        """What `work` returns or raises on the engine's thread, between two steps. Raises `Stopping` when there is
        none."""
        if not self.alive:
            raise Stopping("the engine does not run")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def carry_out() -> None:
            try:
                told = partial(_settle, done, work(self._engine), None)
            except Exception as error:
                told = partial(_settle, done, None, error)
            loop.call_soon_threadsafe(told)

        self._commands.put(carry_out)
        return await done

    def load(self) -> Load:
        """What is under way at this moment, as far as it can be seen from another thread."""
        manager, scheduler = self._engine.runner.manager, self._engine.scheduler
        used, idle = manager.pool.used, manager.tree.idle
        return Load(len(scheduler.running), self._waiting, max(used - idle, 0), idle, manager.pool.capacity)

    @property
    def manager(self) -> CacheManager:
        """The cache's bookkeeping. Before `start` it may be changed."""
        return self._engine.runner.manager

    def make_public(self, text: str) -> int:
        """Before `start`: all tenants share what is computed of a text that a prompt, or a chat's system message,
        begins with. Returns of how many tokens. Raises `RequestError` for a text of less than a block."""
        forms = [self.tokenizer.encode(text)]
        if self.template is not None:
            forms.append(chat_tokens(text, self.template, self.tokenizer))
        size = self.manager.block_size
        shared = max(len(tokens) // size * size for tokens in forms)
        if not shared:
            raise RequestError(f"a public prompt has at least {size} tokens, one block, and this one {len(forms[0])}")
        for tokens in forms:
            self.manager.make_public(tokens)
        return shared

    @property
    def most_running(self) -> int:
        """How many answers may be under way at once."""
        return self._engine.scheduler.most_running

    @property
    def kept(self) -> KeptCache:
        """The tiers behind the memory, of which there may be none."""
        return self._engine.keeper.kept

    @property
    def _waiting(self) -> int:
        return self._submitted - self._taken + len(self._engine.scheduler.waiting)

    async def _embedding(self, session: LiveSession) -> list[float]:
        async for delta in session:
            if delta.error is not None:
                raise delta.error
        ((sequence, _),) = session.choices
        assert sequence.pooled is not None
        length = sequence.pooled.norm()
        return [float(value) for value in (sequence.pooled / length).float()]

    # ---- the engine's thread

    def _main(self) -> None:
        try:
            while not self._ending:
                self._take_commands()
                if not self._engine.idle:
                    self._watch.begin()
                    self._watch.end(self._step())
        except BaseException as error:
            _log.exception("the engine has failed")
            self.failure = error
            self._end_sessions()
            # Who was let in just before is told, too.
            while not self._ending:
                self._commands.get()()

    def _take_commands(self) -> None:
        """Carry out what has been asked for; wait for it only when there is nothing else to do."""
        while True:
            try:
                idle = self._engine.idle and not self._ending
                # What the writers had no room for is handed over when they have some, though nothing runs.
                patience = _WRITING if idle and self._engine.keeper.pending else None
                command = self._commands.get(block=idle, timeout=patience)
            except queue.Empty:
                self._engine.keeper.pump()
                return
            self._watch.begin()
            command()
            self._watch.end(True)

    def _step(self) -> bool:
        """One step of the engine, and what it drew on its way to the readers. Whether it got anything done."""
        engine, started = self._engine, time.perf_counter()
        computed, preemptions = engine.counters.computed, engine.scheduler.preemptions
        lasts = {one: one.times.last for one in (*engine.scheduler.running, *engine.scheduler.waiting)}
        steps = engine.counters.steps
        drawn = engine.step()
        if any(one.sequence.finish_reason is FinishReason.FAILED for one in drawn):
            engine.check()  # if what is left is sound, the others go on
        ended = time.perf_counter()
        self._step_seconds += 0.05 * (ended - started - self._step_seconds)
        deliveries = [(session, delta) for one in drawn for session, delta in self._deltas_or_failure(one)]
        new = [one.sequence for one in drawn if one.token is not None]
        self.listener(
            StepDone(
                tokens=engine.counters.computed - computed,
                sequences=engine.counters.sequences,
                seconds=ended - started,
                drawn=len(new),
                preempted=engine.scheduler.preemptions - preemptions,
                first=tuple(s.times.first - s.times.added for s in new if not lasts.get(s)),
                gaps=tuple(s.times.last - lasts[s] for s in new if lasts.get(s)),
            )
        )
        deliveries += self._progress(ended)
        # Told last, so that whoever has an answer finds it counted.
        self._send(deliveries)
        return bool(drawn) or engine.counters.steps > steps

    def _deltas_or_failure(self, drawn: Drawn) -> list[tuple[LiveSession, Delta]]:
        """The same as `_deltas_of`; a defect ends that sequence alone."""
        if drawn.sequence not in self._sessions:
            return []
        session, index = self._sessions[drawn.sequence]
        try:
            return self._deltas_of(drawn)
        except Exception:
            _log.exception("an answer failed")
            self._engine.finish(drawn.sequence, FinishReason.FAILED)
            if self._sessions.pop(drawn.sequence, None) is not None:
                session.unfinished -= 1
            error = KvistError("the engine failed on this request; the server's log says why")
            return [(session, Delta(index, "", (), FinishReason.FAILED, None, error))]

    def _progress(self, now: float) -> list[tuple[LiveSession, Delta]]:
        """How far the prompts are of which somebody wants to know, and of which no token is drawn yet."""
        told = []
        for sequence, (session, index) in self._sessions.items():
            if session.job.progress and not index and sequence.lease is not None and not sequence.times.first:
                cached, total = sequence.cached.prompt, session.prompt_tokens
                seconds = now - sequence.times.admitted
                done = PrefillProgress(total, cached, min(sequence.lease.length, total), seconds)
                told.append((session, Delta(index, "", (), progress=done)))
        return told

    def _deltas_of(self, drawn: Drawn) -> list[tuple[LiveSession, Delta]]:
        """What a drawn token is to its session. A stop string ends the sequence."""
        sequence = drawn.sequence
        session, index = self._sessions[sequence]
        _, stream = session.choices[index]
        text, tokens = "", tuple[NewToken, ...]()
        if drawn.token is not None:
            text, tokens = stream.push(drawn.token), (NewToken(drawn.token, drawn.logprobs),)
            if stream.stop is not None:
                self._engine.finish(sequence, FinishReason.STOP)
        self._note_prompt(session)
        if sequence.finish_reason is not None:
            return [(session, self._last(session, index, text, tokens))]
        return [(session, Delta(index, text, tokens))]

    def _last(
        self,
        session: LiveSession,
        index: int,
        text: str = "",
        tokens: tuple[NewToken, ...] = (),
        error: KvistError | None = None,
    ) -> Delta:
        """The delta that ends a choice, which is forgotten."""
        sequence, stream = session.choices[index]
        del self._sessions[sequence]
        session.unfinished -= 1
        text += stream.finish()
        reason = sequence.finish_reason
        assert reason is not None
        if stream.stop is not None:
            reason = FinishReason.STOP
        error = error or sequence.error
        if error is not None:
            reason = FinishReason.FAILED
        self._tell(session, sequence)
        return Delta(index, text, tokens, reason, stream.stop, error)

    def _note_prompt(self, session: LiveSession) -> None:
        """What is known of the prompt once its first token is drawn."""
        first = session.choices[0][0]
        if not session.prompt_logprobs and first.request.prompt_logprobs is not None:
            session.prompt_logprobs = [None, *first.prompt_logprobs]
        session.cached_tokens = first.cached.prompt

    def _tell(self, session: LiveSession, sequence: Running) -> None:
        """Facts about a choice that has ended, and about the request when it was the last."""
        cached, length = sequence.cached, len(sequence.request.prompt)
        cause = Cause.FORK if cached.fork else Cause.PROMPT
        if sequence.times.admitted:
            self.listener(Matched(cause, length, cached.fork or min(cached.prompt, length), dict(cached.tiers)))
        if cached.resume_tiers:
            looked = max(len(sequence.tokens), cached.resume)
            self.listener(Matched(Cause.RESUME, looked, cached.resume, dict(cached.resume_tiers)))
        if session.unfinished:
            return
        sequences = [sequence for sequence, _ in session.choices]
        times = [sequence.times for sequence in sequences]
        self.listener(
            RequestDone(
                prompt_tokens=session.prompt_tokens,
                choices=tuple(
                    ChoiceDone(len(s.new_tokens), s.finish_reason or FinishReason.CANCELLED) for s in sequences
                ),
                submitted=session.submitted,
                admitted=min((t.admitted for t in times if t.admitted), default=None),
                first_token=min((t.first for t in times if t.first), default=None),
                ended=time.perf_counter(),
            )
        )

    def _begin(self, session: LiveSession) -> None:
        self._taken += 1
        job = session.job
        try:
            if self._stopping or self.failure is not None:
                raise Stopping(
                    "the server is shutting down" if self._stopping else "the engine has failed; see the log"
                )
            sequences = self._engine.add_choices(job.request, job.choices)
        except KvistError as error:
            session.unfinished = 0
            failed = [Delta(index, "", (), FinishReason.FAILED, None, error) for index in range(job.choices)]
            self._send([(session, delta) for delta in failed])
            return
        stops = stop_strings(self.tokenizer, job.stops)
        for index, sequence in enumerate(sequences):
            ends = self.tokenizer.eos_ids | job.request.stop_ids
            text = TextStream(self.tokenizer, ends, stops, job.keep_special)
            session.choices.append((sequence, text))
            self._sessions[sequence] = session, index

    def _end(self, session: LiveSession, error: KvistError | None) -> None:
        deliveries = []
        for index, (sequence, _) in enumerate(session.choices):
            if sequence in self._sessions:
                if self.failure is None:
                    self._engine.finish(sequence, FinishReason.CANCELLED)
                sequence.finish_reason = sequence.finish_reason or FinishReason.CANCELLED
                deliveries.append((session, self._last(session, index, error=error)))
        self._send(deliveries)

    def _refuse_waiting(self) -> None:
        """End the sessions of which nothing has run yet."""
        waiting = {sequence for sequence in self._engine.scheduler.waiting if not sequence.preempted}
        for session in {session for session, _ in self._sessions.values()}:
            if all(sequence in waiting or sequence.leader in waiting for sequence, _ in session.choices):
                self._end(session, Stopping("the server is shutting down"))

    def _end_all(self) -> None:
        self._end_sessions()
        self._ending = True

    def _end_sessions(self) -> None:
        reason = "the server is shutting down" if self.failure is None else "the engine has failed; see the log"
        for session in {session for session, _ in self._sessions.values()}:
            self._end(session, Stopping(reason))

    def _send(self, deliveries: list[tuple[LiveSession, Delta]]) -> None:
        told = [(session, whole) for session, delta in deliveries if (whole := session.gather(delta)) is not None]
        if not told or self._loop is None:
            return

        def arrive() -> None:
            for session, delta in told:
                session.arrive(delta)

        try:
            self._loop.call_soon_threadsafe(arrive)
        except RuntimeError:  # the loop is closed: nobody reads any more
            _log.debug("nobody is left to tell")


def _settle(done: "asyncio.Future[T]", value: Any, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(value)
    else:
        done.set_exception(error)
