"""The team of threads beneath the operators: each number of a job is done once; errors, forks, sleepers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kvist.ops

_SOURCES = Path(kvist.ops.__file__).parent / "csrc"
_COMPILER = os.environ.get("CXX", "c++")


def _run(tmp_path: Path, sanitizer: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(_COMPILER) is None:
        pytest.skip(f"there is no C++ compiler {_COMPILER!r}")
    program = tmp_path / "stress"
    sources = [str(Path(__file__).parent / "team_stress.cpp"), str(_SOURCES / "team.cpp")]
    built = subprocess.run(
        [_COMPILER, "-std=c++20", "-O1", "-g", "-pthread", *sanitizer, f"-I{_SOURCES}", *sources, "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300)


def test_every_number_of_every_job_is_done_once(tmp_path: Path) -> None:
    done = _run(tmp_path, [])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "threads" in done.stdout


def test_the_thread_sanitizer_finds_nothing(tmp_path: Path) -> None:
    """Without the fork, whose children the sanitizer does not follow."""
    done = _run(tmp_path, ["-fsanitize=thread"], "300", "without-fork")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run under this kernel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: ThreadSanitizer" not in done.stderr
