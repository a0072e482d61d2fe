"""The same prompts through `kvist.LLM` and as `kvist run` computes them, in turns, on one model."""

import random
import time
from collections.abc import Callable

from kvist.bench.machine import Memory, Samples, facts
from kvist.bench.report import Ratio, Report, Row
from kvist.library.llm import LLM
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request, Sampling
from kvist.service.generation import Generation
from kvist.service.loaded import Opening
from kvist.text.tokenizer import Tokenizer

RUN, LIBRARY = "kvist run", "kvist.LLM"
PREFILL, DECODE, WHOLE = "prefill", "decode", "whole request"
_GREEDY = Sampling()

Measured = tuple[tuple[int, ...], dict[str, float]]  # new tokens, and tokens a second of each part


def run(
    opening: Opening, prompt: int, tokens: int, rounds: int, watch: Callable[[str], None] = lambda what: None
) -> Report:
    """Prompts of `prompt` random tokens and up to `tokens` new ones, none of which finds anything of another in the
    cache; one round more than `rounds` is run, and the first is not counted.

    Raises `RuntimeError` unless both draw the same tokens: there is nothing to compare then."""
    memory, rng, report = Memory(), random.Random(0), Report(facts())
    loaded = opening.open()
    tokenizer, engine = loaded.tokenizer(), loaded.engine(loaded.room(prompt + tokens))
    rates: dict[tuple[str, str], list[float]] = {}
    reads = list[float]()
    with LLM(
        opening.model,
        kv=opening.kv,
        weights=opening.weights,
        dtype=opening.dtype,
        activations=opening.activations,
        memory=loaded.room(prompt + 2 * tokens, 4, prefixes=True).nbytes,
    ) as llm:
        for number in range(rounds + 1):
            watch(f"round {number} of {rounds}")
            ids = tuple(rng.randrange(loaded.config.vocab_size) for _ in range(prompt))
            told: dict[str, Measured] = {}
            for name in (RUN, LIBRARY) if number % 2 else (LIBRARY, RUN):
                told[name] = _run(engine, tokenizer, ids, tokens) if name == RUN else _library(llm, ids, tokens)
            if told[RUN][0] != told[LIBRARY][0]:
                raise RuntimeError(f"{LIBRARY} draws other tokens than {RUN}")
            start = time.perf_counter()
            memory.read()
            if number:
                reads.append(time.perf_counter() - start)
                for name, (_, parts) in told.items():
                    for what, rate in parts.items():
                        rates.setdefault((name, what), []).append(rate)
    samples = {key: Samples(tuple(values)) for key, values in rates.items()}
    report.machine["read_gb_s"] = Samples(tuple(reads)).map(memory.gb_s).median
    for what in (PREFILL, DECODE, WHOLE):
        for name in (RUN, LIBRARY):
            one = samples[name, what]
            kind = (loaded.name, loaded.model.weights, loaded.layout.kv, prompt, 1)
            report.rows.append(Row(what, name, *kind, one.median, "tokens/s", one.spread))
        ratio = samples[LIBRARY, what].over(samples[RUN, what])
        report.ratios.append(Ratio(what, LIBRARY, RUN, ratio.median))
    return report


def _run(engine: Engine, tokenizer: Tokenizer, ids: tuple[int, ...], tokens: int) -> Measured:
    engine.runner.manager.tree.clear()
    start = time.perf_counter()
    generation = Generation(engine, tokenizer, Request(ids, tokens, _GREEDY, tokenizer.eos_ids))
    for _ in generation:
        pass
    result, whole = generation.result(), time.perf_counter() - start
    new = len(result.tokens)
    return tuple(result.tokens), {
        PREFILL: len(ids) / result.prefill_seconds,
        DECODE: (new - 1) / result.decode_seconds if new > 1 else 0.0,
        WHOLE: (len(ids) + new) / whole,
    }


def _library(llm: LLM, ids: tuple[int, ...], tokens: int) -> Measured:
    start = time.perf_counter()
    answer = llm.generate(ids, _GREEDY, max_tokens=tokens)
    timings, whole, new = answer.timings, time.perf_counter() - start, len(answer.tokens)
    return answer.tokens, {
        PREFILL: len(ids) / timings.prefill,
        DECODE: (new - 1) / timings.decode if new > 1 else 0.0,
        WHOLE: (len(ids) + new) / whole,
    }
