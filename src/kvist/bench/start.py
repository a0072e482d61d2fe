"""From nothing to the first token: `kvist run` as a process of its own, beside a bare `import torch`, turn by turn."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from kvist.base.errors import KvistError
from kvist.bench.machine import Samples, facts
from kvist.bench.models import random_model
from kvist.bench.report import Report, Row

_PROMPT = "The first token comes after this prompt of a few words"


def run(shapes: Sequence[str], weights: Sequence[str], rounds: int, observe: Callable[[str], None]) -> Report:
    """Each shape with each of `weights`: seconds to the first token, and how many more than `import torch` takes, round
    by round. What is made once (the model, its packed form, compiled Python) is made before."""
    report = Report(facts())
    runs = {}
    for shape in shapes:
        directory = str(random_model(shape, "bf16").directory)
        for how in weights:
            packed = [] if how == "bf16" else ["--weights", how]
            command = [
                sys.executable,
                "-m",
                "kvist",
                "run",
                directory,
                "--prompt",
                _PROMPT,
                "--max-tokens",
                "4",
                *packed,
            ]
            runs[shape, how] = partial(first_output, command)
    bare = partial(first_output, [sys.executable, "-c", "import torch; print(1)"])
    taken: dict[tuple[str, str] | None, list[float]] = {key: [] for key in (None, *runs)}
    for number in range(rounds + 1):
        observe(f"round {number} of {rounds}")
        order = [(None, bare), *runs.items()]
        for key, start in order if number % 2 else reversed(order):
            seconds = start()
            if number:
                taken[key].append(seconds)
    imported = Samples(tuple(taken.pop(None)))
    report.rows.append(Row("import torch", "python", "", "", "", 0, 1, imported.median, "s", imported.spread))
    for (shape, how), values in taken.items():  # type: ignore[misc]
        whole = Samples(tuple(values))
        more = Samples(tuple(a - b for a, b in zip(whole.values, imported.values, strict=True)))
        for what, time in (("first token", whole), ("first token after import torch", more)):
            row = Row(f"{what}, {shape} {how}", "kvist", shape, how, "", 0, 1, time.median, "s", time.spread)
            report.rows.append(row)
    return report


def first_output(command: Sequence[str]) -> float:
    """Seconds from starting a process to its first byte on stdout. Raises `KvistError` where none comes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start = perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode(errors="replace").strip().splitlines()
    if not first or process.returncode:
        raise KvistError(f"{' '.join(command[:4])} ended without a token: {said[-1] if said else 'it said nothing'}")
    return seconds
