"""A server measured from outside: an agent's session, many streams, structured output, a trace of real traffic."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvist.base.errors import KvistError
from kvist.base.units import format_duration
from kvist.bench import structured, throughput
from kvist.bench.agent import Asked, Replay, Session, necessary
from kvist.bench.client import Answer, Client, percentiles
from kvist.bench.machine import facts
from kvist.bench.report import Report
from kvist.bench.served import Served, served
from kvist.bench.structured import Structured
from kvist.bench.trace_replay import read_trace, replay
from kvist.service.loaded import Loaded

PARTS = ("agent", "throughput", "structured")
STREAMS = (1, 2, 4, 8)
_RUNNING = 8
_TRACE_RUNNING = 16
_SPARE = 2048  # tokens of cache beyond what is needed

Watch = Callable[[str], None]


@dataclass(frozen=True)
class TurnRow:
    """One request: `prompt` tokens, of which `cached` were read from the cache; seconds to its first token."""

    thread: str
    turn: int
    prompt: int
    cached: int
    new: int
    first_s: float


@dataclass(frozen=True)
class Traffic:
    """What a run of requests took. `computed` tokens, where `necessary` were (see `agent.necessary`) and `unshared`
    would have been without a cache between requests. Times in seconds, as clients saw them."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    computed: int
    necessary: int
    unshared: int
    seconds: float
    first_p50_s: float
    first_p99_s: float
    gap_p50_s: float
    gap_p99_s: float

    @property
    def over_necessary(self) -> float:
        return self.computed / self.necessary

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were read from the cache."""
        return self.cached_tokens / self.prompt_tokens

    @property
    def ideal_hit_rate(self) -> float:
        """The same of an infinite cache."""
        return 1 - (self.necessary - (self.unshared - self.prompt_tokens)) / self.prompt_tokens


@dataclass(frozen=True)
class AgentReport:
    """A session with sharing, turn by turn, and the same without: its first `measured_turns` were run, in
    `measured_unshared_s`; the time of all of it (`unshared_s`) is estimated from their seconds per token where they are
    not all."""

    prefix: int
    shared: Traffic
    turns: list[TurnRow]
    measured_turns: int
    measured_unshared_s: float
    unshared_s: float
    estimated: bool


@dataclass
class ServeReport:
    """Whatever parts were asked for. `to_json` is documented in docs/json.md."""

    model: str
    kv: str
    machine: dict[str, str | float]
    agent: AgentReport | None = None
    throughput: Report | None = None
    structured: Structured | None = None
    trace: Traffic | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        traffic = {}
        for name, found in (("agent", self.agent and self.agent.shared), ("trace", self.trace)):
            if found is not None:
                traffic[name] = {
                    "over_necessary": found.over_necessary,
                    "hit_rate": found.hit_rate,
                    "ideal_hit_rate": found.ideal_hit_rate,
                }
        return dataclasses.asdict(self) | {"rates": traffic}

    def print(self, console: Console) -> None:
        """Tables for people."""
        console.print(f"{self.model} · KV {self.kv}")
        if self.agent is not None:
            _print_agent(self.agent, console)
        if self.trace is not None:
            console.print(_table("trace", [self.trace], [""]))
        if self.throughput is not None:
            self.throughput.print(console)
        if self.structured is not None:
            found = self.structured
            console.print(
                f"JSON of a schema, {structured.STREAMS} streams: {found.share:.2%} of the steps' time, "
                f"{found.grammar_seconds / found.tokens * 1e6:.0f} us a token; schema compiled in "
                f"{found.compile_seconds * 1e3:.1f} ms, vocabulary read in "
                f"{found.vocabulary_seconds * 1e3:.0f} ms (once); {found.valid} of {found.answers} answers valid"
            )


def run(
    name: str,
    loaded: Loaded,
    parts: Sequence[str],
    *,
    prefix: int,
    turns: int,
    unshared: int,
    rounds: int,
    trace: Path | None,
    limit: int | None,
    scale: float,
    speed: float,
    watch: Watch,
) -> ServeReport:
    """Measure `parts`; `trace` is replayed where it is given. `prefix`, `turns`: of the agent's session; `unshared`:
    turns that are also run without sharing. `watch` hears what is under way."""
    report = ServeReport(name, loaded.layout.kv, facts())
    if "agent" in parts:
        report.agent = measure_agent(loaded, prefix, turns, unshared, watch)
    if "throughput" in parts:
        report.throughput = Report(dict(report.machine))
        throughput.measure(report.throughput, name, loaded, STREAMS, 48, rounds, watch)
    if "structured" in parts:
        report.structured = structured.measure(loaded, 2, watch)
    if trace is not None:
        arrivals = read_trace(trace, limit)
        longest = max(a.prompt_tokens + a.new_tokens for a in arrivals)
        blocks = len({block for arrival in arrivals for block in arrival.blocks})
        tokens = int(scale * (blocks * 512 + longest * _TRACE_RUNNING)) + _SPARE
        with served(loaded, tokens, _TRACE_RUNNING) as server:
            before, started = server.engine.counters.computed, time.perf_counter()
            vocab = loaded.config.vocab_size
            answers = asyncio.run(replay(server.url, arrivals, vocab, scale, speed, watch))
            seconds = time.perf_counter() - started
            report.trace = traffic(answers, server.engine.counters.computed - before, seconds)
    return report


def measure_agent(loaded: Loaded, prefix: int, turns: int, unshared: int, watch: Watch) -> AgentReport:
    """The session twice: with sharing, whole; and its first turns with each request on its own."""
    session = Session.draw(prefix, turns, loaded.config.vocab_size)
    if session.longest > loaded.config.max_positions:
        raise KvistError(
            f"the agent's session comes to {session.longest:,} tokens and the context holds "
            f"{loaded.config.max_positions:,}; try a shorter --prefix or fewer --turns"
        )
    room = session.distinct + loaded.layout.block_size * 4 * turns + _SPARE

    def play(server: Served, key: Callable[[int], str | None], most: int | None) -> tuple[list[Asked], int, float]:
        async def playing() -> list[Asked]:
            async with Client(server.url) as client:
                return await Replay(client, session, key, watch).run(most)

        before, started = server.engine.counters.computed, time.perf_counter()
        asked = asyncio.run(playing())
        return asked, server.engine.counters.computed - before, time.perf_counter() - started

    with served(loaded, room, _RUNNING) as server:
        asked, computed, seconds = play(server, lambda _: None, None)
    shared = traffic([one.answer for one in asked], computed, seconds)
    rows = [
        TurnRow(one.thread, one.turn, len(a.prompt), a.cached, len(a.tokens), a.first)
        for one in asked
        for a in (one.answer,)
    ]
    measured = min(unshared, turns)
    keys = [f"key-{number}" for number in range(max(measured, 1))]
    # Each request has a key, so a tenant, so a cache of its own.
    with served(loaded, session.longest + _SPARE, _RUNNING, keys) as server:
        _, apart, apart_seconds = play(server, lambda number: keys[number], measured)
    estimated = measured < turns or bool(session.subagents)
    each = apart_seconds / apart if apart else 0.0
    return AgentReport(prefix, shared, rows, measured, apart_seconds, each * shared.unshared, estimated)


def traffic(answers: Sequence[Answer], computed: int, seconds: float) -> Traffic:
    """The figures of a run of requests, which stand in the order in which they were sent."""
    firsts = percentiles([answer.first for answer in answers])
    gaps = percentiles([gap for answer in answers for gap in answer.gaps])
    prompt, new = sum(len(a.prompt) for a in answers), sum(len(a.tokens) for a in answers)
    return Traffic(
        requests=len(answers),
        prompt_tokens=prompt,
        cached_tokens=sum(answer.cached for answer in answers),
        new_tokens=new,
        computed=computed,
        necessary=sum(necessary(answers)),
        unshared=prompt + new - len(answers),
        seconds=seconds,
        first_p50_s=firsts[0],
        first_p99_s=firsts[1],
        gap_p50_s=gaps[0],
        gap_p99_s=gaps[1],
    )


def _print_agent(report: AgentReport, console: Console) -> None:
    turns = Table(
        "thread", "turn", "prompt", "cached", "hit", "first token", "new", title="turns", title_justify="left"
    )
    for row in report.turns:
        turns.add_row(
            row.thread,
            str(row.turn + 1),
            f"{row.prompt:,}",
            f"{row.cached:,}",
            f"{row.cached / row.prompt:.1%}",
            f"{row.first_s:.2f}s",
            str(row.new),
        )
    console.print(turns)
    console.print(
        _table(f"an agent's session behind a prefix of {report.prefix:,} tokens", [report.shared], ["shared"])
    )
    about = "about " if report.estimated else ""
    console.print(
        f"without sharing: {report.shared.unshared:,} tokens computed, {about}{format_duration(report.unshared_s)} "
        f"({report.measured_turns} turns of the main thread measured: {format_duration(report.measured_unshared_s)})"
    )
    saved = 1 - report.shared.computed / report.shared.unshared
    console.print(f"saved by sharing: {saved:.1%} of the tokens, {report.shared.hit_rate:.1%} of the prompts' tokens")


def _table(title: str, rows: Sequence[Traffic], names: Sequence[str]) -> Table:
    columns = (
        "",
        "requests",
        "prompt",
        "cached",
        "ideal",
        "computed",
        "/ necessary",
        "first p50",
        "p99",
        "gap p50",
        "p99",
    )
    table = Table(*columns, "new tokens/s", "time", title=title, title_justify="left")
    for name, row in zip(names, rows, strict=True):
        table.add_row(
            name,
            f"{row.requests:,}",
            f"{row.prompt_tokens:,}",
            f"{row.hit_rate:.1%}",
            f"{row.ideal_hit_rate:.1%}",
            f"{row.computed:,}",
            f"{row.over_necessary:.4f}",
            f"{row.first_p50_s:.2f}s",
            f"{row.first_p99_s:.2f}s",
            f"{row.gap_p50_s * 1e3:.0f}ms",
            f"{row.gap_p99_s * 1e3:.0f}ms",
            f"{row.new_tokens / row.seconds:.1f}",
            format_duration(row.seconds),
        )
    return table
