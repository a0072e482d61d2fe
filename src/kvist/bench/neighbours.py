"""Decoding alone on the machine and beside processes that only spin, as everybody's machine has something else to do.

The neighbours are stopped and let go on, so that both are measured turn by turn, ours and another engine's. Weights are
random and the context is filled in, which changes no time."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

import torch

from kvist.bench.beside import Ours
from kvist.bench.machine import Memory, Samples, facts
from kvist.bench.models import random_model
from kvist.bench.peers.engines import LLAMA_CPP, SETTINGS, Setting, model_of
from kvist.bench.peers.worker import Worker
from kvist.bench.report import Ratio, Report, Row

STEPS = 32  # decode steps that are timed together: several time slices of the operating system
_SETTLED = 0.05  # seconds in which neighbours have come back to work, or threads that wait have fallen asleep
_SPIN = "while True: pass"


class Neighbours:
    """So many processes that spin, stopped where nothing else is said. A context manager: they end with it."""

    def __init__(self, count: int) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
        self._signal(signal.SIGSTOP)

    def __enter__(self) -> "Neighbours":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While it is open, they spin."""
        self._signal(signal.SIGCONT)
        try:
            sleep(_SETTLED)
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


def run(
    shape: str,
    weights: str,
    kv: str,
    context: int,
    count: int,
    rounds: int,
    llama_cpp: Path | None,
    observe: Callable[[str], None],
) -> Report:
    """Tokens a second alone and beside `count` busy processes. `llama_cpp`: the python of an environment that has it,
    to be measured in the same turns, in the first of its settings, with threads that wait as they do by default."""
    report, memory = Report(facts()), Memory()
    case = f"decode {shape} {weights} {context}"
    with contextlib.ExitStack() as stack:
        observe(f"{case}: filling")
        ours = Ours(random_model(shape, "bf16", kv, None if weights == "bf16" else weights), context + STEPS)
        ours.fill(context)
        decoders = {("kvist", kv): partial(ours.decode, STEPS, perf_counter)}
        if llama_cpp is not None:
            setting = SETTINGS[LLAMA_CPP][0]
            worker = stack.enter_context(contextlib.closing(_llama_cpp(setting, shape, weights, context, llama_cpp)))
            decoders[LLAMA_CPP, setting.label] = partial(worker.ask, "decode", STEPS)
        neighbours = stack.enter_context(Neighbours(count))
        observe(f"{case}: alone and beside {count} busy processes")
        alone, beside, reads = _turns(decoders, neighbours, memory, rounds)
    for (engine, label), seconds in alone.items():
        both = {"alone": seconds, f"beside {count} busy": beside[engine, label]}
        for where, samples in both.items():
            speed = samples.map(lambda s: 1 / s)
            name = f"{case}, {where}"
            row = Row(name, engine, shape, weights, label, context, 1, speed.median, "tokens/s", speed.spread)
            report.rows.append(row)
        kept = seconds.over(beside[engine, label]).median
        report.ratios.append(Ratio(case, f"{engine} beside {count} busy", f"{engine} alone", kept))
    if llama_cpp is not None:
        mine, theirs = decoders
        for where, found in (("alone", alone), (f"beside {count} busy", beside)):
            ratio = found[theirs].over(found[mine]).median
            report.ratios.append(Ratio(f"{case}, {where}", f"kvist {kv}", f"{LLAMA_CPP} {theirs[1]}", ratio))
    report.machine["read_gb_s"] = reads.map(memory.gb_s).median
    return report


def _llama_cpp(setting: Setting, shape: str, weights: str, context: int, python: Path) -> Worker:
    first = {
        "model": str(model_of(LLAMA_CPP, shape, weights, python)),
        "most": context + STEPS,
        "threads": torch.get_num_threads(),
    }
    worker = Worker(LLAMA_CPP, python, "llama_cpp_worker.py", first | dict(setting.how), passive=False)
    worker.ask("fill", context)
    return worker


_Decoder = tuple[str, str]  # an engine, and the type of its KV


def _turns(
    decoders: dict[_Decoder, Callable[[], float]], neighbours: Neighbours, memory: Memory, rounds: int
) -> tuple[dict[_Decoder, Samples], dict[_Decoder, Samples], Samples]:
    """Seconds a token of each, alone and beside the neighbours, and of reading the memory alone; once a round, every
    other round backwards, after one round that is not counted."""
    alone: dict[_Decoder, list[float]] = {name: [] for name in decoders}
    beside: dict[_Decoder, list[float]] = {name: [] for name in decoders}
    reads: list[float] = []
    for number in range(rounds + 1):
        order = list(decoders.items()) if number % 2 else list(decoders.items())[::-1]
        for name, decode in order:
            sleep(_SETTLED)
            quiet = decode()
            with neighbours.busy():
                busy = decode()
            if number:
                alone[name].append(quiet)
                beside[name].append(busy)
        sleep(_SETTLED)
        start = perf_counter()
        memory.read()
        if number:
            reads.append(perf_counter() - start)
    samples = lambda lists: {name: Samples(tuple(values)) for name, values in lists.items()}  # noqa: E731
    return samples(alone), samples(beside), Samples(tuple(reads))
