"""What becomes of a verb's process: its reader goes away, and Ctrl-C comes while it starts."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvist.cli.process import starting

VERBS = ["--help", "plan --json", "trace -p abc", "run -p abc", "verify --steps 1 --trials 1 --tokens 70"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_is_gone_is_no_error(verb: str) -> None:
    """Nobody reads from the first byte on, so every write fails, the last flush too."""
    command = [sys.executable, "-m", "kvist", *verb.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(300) == 0, err
    assert "Traceback" not in err
    assert "Broken" not in err


def test_ctrl_c_ends_an_import_that_swallows_interrupts(tmp_path: Path) -> None:
    """As PyTorch does while it looks for NumPy. An interrupt that is only raised is lost there."""
    (tmp_path / "deaf.py").write_text("""
import os, signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
""")
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from kvist.cli.process import starting
{how}
print("went on")
"""
    ends = {}
    for name, how in {"bare": "import deaf", "starting": "with starting():\n    import deaf"}.items():
        run = subprocess.run(
            [sys.executable, "-c", code.format(how=how)], capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        ends[name] = (run.returncode, run.stdout)
    assert ends == {"bare": (0, "went on\n"), "starting": (-signal.SIGINT, "")}


def test_interrupts_are_pythons_again_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with starting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with starting():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
