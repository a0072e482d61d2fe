"""Beside busy processes: they are stopped while others are measured alone, spin otherwise, and end."""

import time
from collections.abc import Callable

import psutil
import pytest

from kvist.bench import neighbours
from kvist.bench.neighbours import Neighbours
from kvist.service.loaded import open_model


def _cpu(neighbours: Neighbours) -> float:
    return sum(psutil.Process(process.pid).cpu_times().user for process in neighbours._processes)


def _state(neighbours: Neighbours) -> set[str]:
    return {psutil.Process(process.pid).status() for process in neighbours._processes}


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_neighbours_spin_only_while_they_are_let_and_end() -> None:
    with Neighbours(2) as two:
        _wait_for(lambda: _state(two) == {psutil.STATUS_STOPPED})
        before = _cpu(two)
        with two.busy():
            _wait_for(lambda: _cpu(two) > before + 0.05)
        _wait_for(lambda: _state(two) == {psutil.STATUS_STOPPED})
        processes = [psutil.Process(process.pid) for process in two._processes]
    assert not any(process.is_running() for process in processes)


def test_neighbours_end_when_what_is_measured_fails() -> None:
    processes = []

    def fail() -> None:
        with Neighbours(1) as one:
            processes.append(psutil.Process(one._processes[0].pid))
            with one.busy():
                raise ValueError("it broke")

    with pytest.raises(ValueError, match="broke"):
        fail()
    assert not processes[0].is_running()


def test_both_are_measured_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "random_model", lambda shape, dtype, kv, weights: open_model(None, kv=kv))
    report = neighbours.run("bundled", "int8", "bf16", 64, 1, 2, None, lambda what: None)
    assert [row.what.rpartition(", ")[2] for row in report.rows] == ["alone", "beside 1 busy"]
    (ratio,) = report.ratios
    assert ratio.a == "kvist beside 1 busy"
    assert ratio.value > 0
    assert all(row.value > 0 and row.unit == "tokens/s" for row in report.rows)
