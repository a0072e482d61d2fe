"""Tokens a second of many streams on one server, beside one stream, and beside what `kvist run` does."""

import asyncio
import random
from collections.abc import Callable, Sequence

from kvist.bench.client import Client
from kvist.bench.machine import Memory, Samples, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.bench.served import served
from kvist.runtime.request import Request, Sampling
from kvist.service.generation import Generation
from kvist.service.loaded import Loaded

PROMPT = 16  # tokens
_TEMPERATURE = 0.8
RUN, SERVE = "kvist run", "kvist serve"


def measure(
    report: Report,
    shape: str,
    loaded: Loaded,
    streams: Sequence[int],
    tokens: int,
    rounds: int,
    watch: Callable[[str], None],
) -> None:
    """Adds rows of `tokens` new tokens a stream, whole requests, in rounds of which each measures everything once, and
    ratios to one stream and to `kvist run`. Nobody finds anything of another in the cache."""
    rng, memory = random.Random(0), Memory()
    vocab = loaded.config.vocab_size
    tokenizer = loaded.tokenizer()
    own = loaded.engine(loaded.room(PROMPT + tokens))

    def prompt() -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(PROMPT))

    def run() -> None:
        own.runner.manager.tree.clear()
        sampling = Sampling(temperature=_TEMPERATURE, seed=rng.randrange(2**32))
        list(Generation(own, tokenizer, Request(prompt(), tokens, sampling)))

    async def together(url: str, count: int) -> None:
        async with Client(url) as client:
            asking = [client.complete(prompt(), tokens, seed=rng.randrange(2**32)) for _ in range(count)]
            for answer in await asyncio.gather(*asking):
                assert len(answer.tokens) == tokens

    most = max(streams)
    watch(f"{shape}: {', '.join(map(str, streams))} streams of {tokens} tokens")
    with served(loaded, most * (PROMPT + tokens + loaded.layout.block_size), most) as server:
        serving = [lambda count=count: asyncio.run(together(server.url, count)) for count in streams]
        alone, *times, read = interleave([run, *serving, memory.read], rounds)
    weights = loaded.model.weights
    report.machine.setdefault("read_gb_s", read.map(memory.gb_s).median)

    def add(engine: str, count: int, samples: Samples) -> Samples:
        rates = samples.map(lambda seconds: count * tokens / seconds)
        what = f"{count} streams" if count > 1 else "1 stream"
        kv, context = loaded.layout.kv, PROMPT + tokens
        row = Row(what, engine, shape, weights, kv, context, count, rates.median, "tokens/s", rates.spread)
        report.rows.append(row)
        return rates

    single = add(RUN, 1, alone)
    rates = {count: add(SERVE, count, time) for count, time in zip(streams, times, strict=True)}
    for count, rate in rates.items():
        if count == 1:
            report.ratios.append(Ratio("1 stream", SERVE, RUN, rate.over(single).median))
        elif 1 in rates:
            report.ratios.append(Ratio(f"{count} streams", SERVE, f"{SERVE} with one", rate.over(rates[1]).median))
