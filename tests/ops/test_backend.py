"""Choosing, forcing and building the operators."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from paged import BACKENDS

from kvist.base.errors import BackendError, KvistError
from kvist.ops import build
from kvist.ops.backend import explain, select

SELECT = """
import sys, torch
from kvist.ops.backend import select
for _ in range(2):
    backend = select("cpu", torch.bfloat16, 64, 64, sys.argv[1] or None)
print(backend.name, backend.silu_mul(torch.ones(1, 2)).item(), "torch.utils.cpp_extension" in sys.modules)
"""


def select_elsewhere(force: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Selects twice in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", SELECT, force]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_the_compiled_operators_come_first():
    assert select("cpu", torch.bfloat16, 64, 64).name == "cpu"
    for name in BACKENDS:
        assert select("cpu", torch.bfloat16, 64, 64, name).name == name


def test_explanations():
    reasons = dict(explain("cpu", torch.bfloat16, 64, 64))
    assert list(reasons) == ["cpu", "portable", "avx2", "reference"]
    assert reasons["cpu"] is None
    assert "only when forced" in reasons["portable"]
    assert "only when forced" in reasons["avx2"]
    assert reasons["reference"] is None
    assert "not on cuda" in dict(explain("cuda", torch.bfloat16, 64, 64))["cpu"]
    assert all(
        "head_dim" in reason for name, reason in explain("cpu", torch.bfloat16, 65, 64) if name in ("cpu", "reference")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("cpu", torch.bfloat16, 64, 64, "fastest"),
            "no backend 'fastest'; choose one of cpu, portable, avx2, reference",
        ),
        (("cuda", torch.bfloat16, 64, 64, "cpu"), "the cpu backend cannot run: .*not on cuda"),
        (("cpu", torch.bfloat16, 64, 48, "reference"), "the reference backend cannot run: block_size"),
        (("cpu", torch.float64, 64, 64, None), "no backend can run: .*float64"),
    ],
)
def test_refusals_say_why(arguments, message):
    with pytest.raises(BackendError, match=message):
        select(*arguments)


def test_a_library_that_is_there_is_loaded_without_a_compiler():
    select("cpu", torch.bfloat16, 64, 64)  # is built from here on
    result = select_elsewhere(CXX="/nonexistent")
    assert result.stdout.split() == ["cpu", str(torch.sigmoid(torch.ones(())).item()), "False"]
    assert result.stderr == ""


def test_without_a_compiler_the_reference_runs_and_says_so_once(tmp_path):
    result = select_elsewhere(CXX="/nonexistent", KVIST_CACHE=str(tmp_path))
    assert result.stdout.startswith("reference")
    assert len(result.stderr.splitlines()) == 1
    assert "install g++" in result.stderr
    forced = select_elsewhere("cpu", CXX="/nonexistent", KVIST_CACHE=str(tmp_path))
    assert forced.returncode != 0
    assert "BackendError: the cpu backend cannot run: there is no C++ compiler '/nonexistent'" in forced.stderr


def test_a_compiler_that_fails_leaves_its_messages_and_no_library(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\ncase $1 in -*v*|-dump*) echo g++ 13.1.0;; *) echo no such luck; exit 1;; esac\n")
    compiler.chmod(0o755)
    result = select_elsewhere(CXX=str(compiler), KVIST_CACHE=str(tmp_path / "cache"))
    assert result.stdout.startswith("reference")
    begun, line = result.stderr.splitlines()
    count = len(list((Path(build.__file__).parent / "csrc").glob("*.cpp")))
    assert begun == f"kvist: compiling the CPU kernels (once): {count} files with {compiler}"
    log = Path(line.split()[-1])
    assert "no such luck" in log.read_text()
    assert sorted(path.name for path in log.parent.iterdir()) == ["kvist_cpu.failed.json", "kvist_cpu.log", "lock"]


def failing(monkeypatch, tmp_path, messages: str) -> list[str]:
    """Has the compiler, any that is there, end with `messages`; returns what grows with each time that it runs."""
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    runs: list[str] = []

    def run_compiler(namespace: str, flags: list[str], folder: str) -> None:
        runs.append(folder)
        raise RuntimeError(messages)

    monkeypatch.setattr(build, "_run_compiler", run_compiler)
    return runs


def test_a_compilation_that_failed_is_not_tried_again_at_once(tmp_path, monkeypatch):
    runs = failing(monkeypatch, tmp_path, "kernels.cpp:1: error: no such luck")
    said = []
    for _ in range(2):
        with pytest.raises(BackendError) as caught:
            build._library("kvist_cpu", build.Variant.NATIVE)
        said.append(str(caught.value))
    assert len(runs) == 1
    assert "the compiler's messages are in" in said[0]
    assert said[1].startswith(said[0])
    assert re.search(r"it is tried again in (24h00|23h59)m, with another CXX or MAX_JOBS", said[1])
    assert "\n" not in said[1]
    monkeypatch.setenv("CXX", "false")  # another compiler
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    [failed] = tmp_path.rglob("*.failed.json")
    os.utime(failed, (time.time() - 90_000,) * 2)
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 3
    failed.write_text("{")  # what cannot be read is no reason
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 4


def test_a_compiler_that_was_killed_is_named_and_not_tried_for_an_hour(tmp_path, monkeypatch):
    runs = failing(monkeypatch, tmp_path, "c++: fatal error: Killed signal terminated program cc1plus")
    for said in (
        r"memory is short; with MAX_JOBS=1 it takes the least$",
        r"the least; it is tried again in (1h00|59)m",
    ):
        with pytest.raises(BackendError, match=said):
            build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 1
    monkeypatch.setenv("MAX_JOBS", "1")  # fewer files at once take less memory
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    [failed] = tmp_path.rglob("*.failed.json")
    os.utime(failed, (time.time() - 3700,) * 2)
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 3


def test_a_disk_that_was_full_is_named_and_tried_again(tmp_path, monkeypatch):
    runs = failing(monkeypatch, tmp_path, "fatal error: No space left on device")
    for _ in range(2):
        with pytest.raises(BackendError, match="the disk is full; make room for"):
            build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 2


@pytest.mark.parametrize("full", ["ops", "temporary"])
def test_on_a_full_disk_nothing_is_compiled(tmp_path, monkeypatch, full):
    runs = failing(monkeypatch, tmp_path, "not reached")
    usage = build.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(
        build.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20 if full in path.parts else 1 << 40)
    )
    with pytest.raises(BackendError, match=rf"the disk is full: .*{full}.*, where 1\.0 MiB are free"):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert runs == []


def test_what_a_killed_compilation_left_is_deleted_and_told(tmp_path, monkeypatch, capsys):
    failing(monkeypatch, tmp_path, "no such luck")
    for times in range(2):
        with pytest.raises(BackendError):
            build._library("kvist_cpu", build.Variant.NATIVE)
        assert ("an earlier try was killed before its end" in capsys.readouterr().err) == bool(times)
        [lock] = tmp_path.rglob("lock")
        lock.with_name("kvist_cpu.failed.json").unlink()
        (lock.parent / "building-xyz").mkdir(exist_ok=True)
        (lock.parent / "building-xyz" / "attend.o").touch()
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert sorted(path.name for path in lock.parent.iterdir()) == ["kvist_cpu.failed.json", "kvist_cpu.log", "lock"]


def test_it_is_shown_how_many_files_are_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    shown: list[tuple[int, int]] = []
    seen = threading.Condition()

    @contextlib.contextmanager
    def progress(work: str, unit: str, at_once: int):
        def watch(done: int, total: int) -> None:
            with seen:
                shown.append((done, total))
                seen.notify_all()

        yield watch

    def run_compiler(namespace: str, flags: list[str], folder: str) -> None:
        for done in range(3):
            with seen:
                assert seen.wait_for(lambda done=done: any(pair[0] == done for pair in shown), 20)
            (Path(folder) / f"{done}.o").touch()
        (Path(folder) / f"{namespace}.so").write_bytes(b"library")

    monkeypatch.setattr(build, "progress", progress)
    monkeypatch.setattr(build, "_run_compiler", run_compiler)
    build._library("kvist_cpu", build.Variant.NATIVE)
    assert [pair[0] for pair in shown] == sorted(pair[0] for pair in shown)
    assert {pair[1] for pair in shown} == {len(build._sources())}
    assert not [thread for thread in threading.enumerate() if thread.name == "kvist-compiling"]


def test_who_waits_for_another_process_says_so(tmp_path, monkeypatch, capsys):
    with build._locked(tmp_path):
        assert capsys.readouterr().err == ""
        waited = threading.Event()
        monkeypatch.setattr(build, "_say", lambda text: (print(text), waited.set()))
        waiting = threading.Thread(target=lambda: build._locked(tmp_path).__enter__())
        waiting.start()
        assert waited.wait(20)
    waiting.join(20)
    assert not waiting.is_alive()
    assert "another process is compiling the CPU kernels" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_a_library_that_another_user_put_there_is_not_loaded(tmp_path, monkeypatch):
    runs = failing(monkeypatch, tmp_path, "not reached")
    with pytest.raises(BackendError):
        build._library("kvist_cpu", build.Variant.NATIVE)
    [lock] = tmp_path.rglob("lock")
    library = lock.with_name("kvist_cpu.so")
    library.write_bytes(b"planted")
    assert build._library("kvist_cpu", build.Variant.NATIVE) == library
    os.chown(library, 65534, 65534)
    with pytest.raises(KvistError, match="belongs to another user"):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert "belongs to another user" in build.load_kernels.__wrapped__("kvist_cpu", build.Variant.NATIVE)
    os.chown(lock.parent, 65534, 65534)
    with pytest.raises(KvistError, match="belongs to another user"):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert len(runs) == 1


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), build._locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_processes_that_start_together_build_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))
    built: list[str] = []

    def run_compiler(namespace: str, flags: list[str], folder: str) -> None:
        built.append(folder)
        time.sleep(0.2)
        (Path(folder) / f"{namespace}.so").write_bytes(b"library")

    monkeypatch.setattr(build, "_run_compiler", run_compiler)
    found: list[Path] = []
    workers = [
        threading.Thread(target=lambda: found.append(build._library("kvist_cpu", build.Variant.NATIVE)))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(built) == 1
    assert len(set(found)) == 1
    assert found[0].read_bytes() == b"library"
    assert sorted(path.name for path in found[0].parent.iterdir()) == ["kvist_cpu.so", "lock"]


def test_a_build_that_dies_leaves_no_library(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path))

    def killed(namespace: str, flags: list[str], folder: str) -> None:
        (Path(folder) / f"{namespace}.so").write_bytes(b"half a libr")
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_run_compiler", killed)
    with pytest.raises(KeyboardInterrupt):
        build._library("kvist_cpu", build.Variant.NATIVE)
    assert not list(tmp_path.rglob("*.so"))


def test_a_processor_that_is_not_known_to_have_avx2_is_not_asked_to_run_it(monkeypatch):
    monkeypatch.setattr(build, "_processor", lambda: "flags : fpu sse2 avx")
    assert (
        build.load_kernels.__wrapped__("kvist_avx2", build.Variant.AVX2) == "this processor is not known to have AVX2"
    )


def test_each_build_has_its_own_place(monkeypatch):
    usual = build._digest(["-O3"])
    assert usual == build._digest(["-O3"])
    assert usual != build._digest(["-O2"])
    monkeypatch.setattr(build, "_processor", lambda: "flags: another processor")
    assert usual != build._digest(["-O3"])
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert usual != build._digest(["-O3"])


def test_the_cause_of_a_failure_has_the_compilers_first_error(tmp_path):
    said = "ninja: build stopped\n  x.cpp:3:1: error: 'y' was not declared  \nz.cpp:1:1: error: another"
    cause = build._failure(said, tmp_path / "log").cause
    assert cause.startswith("the C++ kernels did not compile: x.cpp:3:1: error: 'y' was not declared; the compiler's")
    assert "did not compile; the" in build._failure("no such luck", tmp_path / "log").cause
