"""What the fuzzers of readers share. A library: each fuzzer makes its own inputs.

KVIST_FUZZ: how many inputs each of them is given, in place of its own number for the suite. Input n of a fuzzer is the
same in every run, whatever came before it.
"""

import os
import random
import time
import traceback
from collections.abc import Callable

import pytest

from kvist.base.errors import KvistError
from kvist.text.template_process import TemplateProcess

SECONDS = 10  # of this process's time, whatever others do
CHARACTERS = 400
_MOST_FOUND = 10


def ends(read: Callable[[], object]) -> bool:
    """Whether it was read. Anything else than one line of refusal, in time, is a failure."""
    start, refusal = time.process_time(), None
    try:
        read()
    except KvistError as error:
        refusal = str(error)
    assert time.process_time() - start < SECONDS
    assert refusal is None or ("\n" not in refusal and len(refusal) <= CHARACTERS), refusal[:2000]
    return refusal is None


def fuzz(name: str, usual: int, prepare: Callable[[random.Random], Callable[[], object]]) -> float:
    """The share of the inputs that was read. `prepare` makes an input, and what reads it; `usual`: how many in the
    suite. Prints the counts. Fails with all that did not end as it should, up to ten."""
    count, read, slowest, found = int(os.environ.get("KVIST_FUZZ", usual)), 0, 0.0, []
    for number in range(count):
        reader = prepare(random.Random(f"{name} {number}"))
        start = time.process_time()
        try:
            read += ends(reader)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of a library in Rust is no `Exception`
            found.append(f"{name}, input {number}: {traceback.format_exc(limit=-4)[-3000:]}")
            if len(found) == _MOST_FOUND:
                break
        slowest = max(slowest, time.process_time() - start)
    print(f"{name}: {count:,} inputs, {read:,} read, the slowest {slowest:.2f} s, {len(found)} failed")
    assert not found, "\n".join(found)
    return read / count


def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat template that compiled is not compiled again: nearly all inputs have the same one, and each takes a new
    process."""
    compiled: set[tuple[tuple[str, str], ...]] = set()
    real = TemplateProcess.compile

    def compile_(process: TemplateProcess) -> None:
        sources = tuple(process.sources.items())
        if sources not in compiled:
            real(process)
            compiled.add(sources)

    monkeypatch.setattr(TemplateProcess, "compile", compile_)
