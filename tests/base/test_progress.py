"""What is shown of a piece of work that takes a while."""

import io
import re
import sys

import pytest
import rich.console

from kvist.base.progress import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_off_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("compiling", "files", clock=clock) as watch:
        for second in range(61):
            clock.now = second
            watch(second // 10 * 400, 2400)
    assert capsys.readouterr().err.splitlines() == [
        "kvist: compiling: 400 of 2,400 files in 15.0s, about 1m15s left",
        "kvist: compiling: 1,200 of 2,400 files in 30.0s, about 30.0s left",
        "kvist: compiling: 1,600 of 2,400 files in 45.0s, about 22.5s left",
    ]


def test_what_is_soon_done_says_nothing_and_nothing_done_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("compiling", "files", clock=clock) as watch:
        clock.now = 14
        watch(1, 2)
    assert capsys.readouterr().err == ""
    with progress("compiling", "files", clock=clock) as watch:
        clock.now = 30
        watch(0, 2)
    assert capsys.readouterr().err == "kvist: compiling: 0 of 2 files in 16.0s\n"


def test_what_is_under_way_counts_as_half(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("compiling", "files", at_once=4, clock=clock) as watch:
        clock.now = 15
        watch(3, 10)  # five are as good as done
        clock.now = 30
        watch(9, 10)  # no more than one can be under way
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("about 15.0s left")
    assert second.endswith("about 1.6s left")


def test_on_a_terminal_one_line_is_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown, clock, console = Terminal(), Clock(), rich.console.Console
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(
        rich.console, "Console", lambda stderr: console(stderr=stderr, width=80, force_terminal=True, _environ={})
    )
    with progress("compiling the CPU kernels", "files", clock=clock) as watch:
        clock.now = 20
        watch(8, 24)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue())
    assert "compiling the CPU kernels" in text
    assert "8 of 24 files, about 40.0s left" in text
    assert "kvist:" not in text
    assert shown.getvalue().rstrip().endswith("\x1b[2K"), "it is gone when the work is done"
