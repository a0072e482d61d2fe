"""The C++ kernels as a library: compiled once per machine and PyTorch, afterwards loaded in milliseconds.

The library lies in `cache_folder()/ops/<digest>`, where the digest covers all that its machine code depends on, so a
changed source, PyTorch or processor is another library. It is built in a temporary folder under a lock and renamed
into place: it is there whole or not at all, also when several processes start at once or one is killed. What another
user could have written is not loaded, and no link in its place is followed.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import torch

from kvist.base.errors import BackendError, KvistError
from kvist.base.files import atomic_file, cache_folder, check_own_file, make_folders, own_folder, read_json
from kvist.base.progress import progress
from kvist.base.units import format_bytes, format_duration

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-O3",
    "-ffp-contract=off",  # the order of roundings is part of the result
    "-fno-strict-aliasing",  # scores become weights, and bytes become pairs, in place
    "-fwrapv",  # whole numbers run over where a number is not finite, which the floats beside them show
    "-fvisibility=hidden",  # two builds of one source may be loaded side by side
    "-Wno-psabi",
)
_NEEDED = 64 << 20  # bytes that a compilation takes on disk for a while
_DAY, _HOUR = 86_400.0, 3600.0  # seconds
_UNDER_WAY = "building-"  # folders of compilations
_LOOK = 0.25  # seconds between two looks at how far one is


class Variant(Enum):
    """What the one source is compiled for, as flags of the compiler."""

    NATIVE = ("-march=native",)
    PORTABLE = ("-march=native", "-DKVIST_PORTABLE")  # without what is made for one kind of processor
    AVX2 = ("-march=x86-64-v3",)


def unsupported(variant: Variant) -> str | None:
    """Why this processor does not run a variant, or None when it does."""
    if variant is Variant.AVX2 and not {"avx2", "fma", "bmi2"} <= set(_processor().split()):
        return "this processor is not known to have AVX2"
    return None


@cache
def load_kernels(namespace: str, variant: Variant) -> str | None:
    """Loads the kernels as operators in `namespace`, compiling them first where needed; says why when it cannot.

    The outcome holds for the process.
    """
    if reason := unsupported(variant):
        return reason
    try:
        torch.ops.load_library(_library(namespace, variant))
    except (KvistError, OSError) as error:
        return str(error).splitlines()[0]
    return None


def _library(namespace: str, variant: Variant) -> Path:
    flags = [*_FLAGS, *variant.value, f"-DKVIST_NAMESPACE={namespace}"]
    flags += ["-fopenmp"] if sys.platform == "linux" else []
    folder = own_folder(cache_folder() / "ops" / _digest(flags))
    library = folder / f"{namespace}.so"
    if not library.exists():
        make_folders(folder)
        with _locked(folder):
            if not library.exists():
                _compile(namespace, flags, library)
    check_own_file(library)
    return library


def _digest(flags: list[str]) -> str:
    """Of everything that decides the machine code."""
    digest = hashlib.sha256()
    for part in (torch.__version__, platform.machine(), _processor(), *flags):
        digest.update(part.encode() + b"\0")
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The instructions that `-march=native` may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock falls with the process, however it ends."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is compiling the CPU kernels, and this one waits for them")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"kvist: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Way:
    """How the kernels are compiled: another way may succeed where one has failed. `jobs`: of how many the user lets
    run at once, as it was given."""

    compiler: str
    jobs: str


@dataclass(frozen=True)
class _Failure:
    """Why a compilation failed, in one line, and the seconds for which it is not tried again."""

    cause: str
    lasts: float


def _compile(namespace: str, flags: list[str], library: Path) -> None:
    way = _way()
    for folder in (library.parent, Path(tempfile.gettempdir())):  # the compiler's own files are in the other
        if (free := shutil.disk_usage(folder).free) < _NEEDED:
            raise BackendError(
                f"the disk is full: compiling the C++ kernels takes {format_bytes(_NEEDED)} in {folder}, "
                f"where {format_bytes(free)} are free"
            )
    failed = library.with_suffix(".failed.json")
    if told := _remembered(failed, way):
        raise BackendError(told)
    again = "; an earlier try was killed before its end" if _sweep(library.parent) else ""
    _say(f"compiling the CPU kernels (once): {len(_sources())} files with {way.compiler}{again}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=_UNDER_WAY, dir=library.parent) as folder:
        try:
            with _shown(Path(folder)):
                _run_compiler(namespace, flags, folder)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # with what ninja and the compiler said
            log = library.with_suffix(".log")
            failure = _failure(str(error), log)
            with contextlib.suppress(OSError, KvistError):  # a full disk takes neither
                log.write_text(str(error))
                with atomic_file(failed) as target:
                    target.write_text(json.dumps(asdict(failure) | asdict(way)))
            raise BackendError(failure.cause) from error
        # Moved, not copied: PyTorch has already loaded this very file, and loading it by its new name is then free.
        with atomic_file(library) as target:
            os.replace(Path(folder) / library.name, target)
    failed.unlink(missing_ok=True)
    _say(f"the CPU kernels are compiled ({format_duration(time.monotonic() - began)})")


def _way() -> _Way:
    """Raises `BackendError` where there is no compiler."""
    compiler = shutil.which(name := os.environ.get("CXX", "c++"))
    if compiler is None:
        raise BackendError(f"there is no C++ compiler {name!r}; install g++, or name one in CXX")
    return _Way(compiler, os.environ.get("MAX_JOBS", ""))


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.cpp"))


def _sweep(folder: Path) -> bool:
    """Delete what compilations left that were killed; whether there were any. The caller holds the lock."""
    left = list(folder.glob(f"{_UNDER_WAY}*"))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return bool(left)


@contextlib.contextmanager
def _shown(folder: Path) -> Iterator[None]:
    """Within it a thread looks how many files are compiled, and shows it."""
    over, total = threading.Event(), len(_sources())

    def look() -> None:
        # As many at once as ninja lets run.
        with progress("compiling the CPU kernels", "files", (os.cpu_count() or 1) + 1) as watch:
            while not over.wait(_LOOK):
                watch(len(list(folder.glob("*.o"))), total)

    thread = threading.Thread(target=look, name="kvist-compiling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _failure(messages: str, log: Path) -> _Failure:
    """What the messages of a compiler come to. A full disk is looked for before anything is compiled."""
    begun = "the C++ kernels did not compile"
    if "No space left on device" in messages or "Disk quota exceeded" in messages:
        rooms = f"{log.parent} and {tempfile.gettempdir()}"
        return _Failure(f"{begun}: the disk is full; make room for {rooms} and start again", 0.0)
    if "Killed" in messages or "terminated signal" in messages:
        why = "the compiler was killed, as happens where memory is short; with MAX_JOBS=1 it takes the least"
        return _Failure(f"{begun}: {why}", _HOUR)
    first = next((f": {line.strip()[:200]}" for line in messages.splitlines() if "error:" in line), "")
    return _Failure(f"{begun}{first}; the compiler's messages are in {log}", _DAY)


def _remembered(failed: Path, way: _Way) -> str | None:
    """What there is to say where it failed in this way not long ago, or None."""
    try:
        age, found = time.time() - failed.stat().st_mtime, read_json(failed, 1 << 16)
    except (KvistError, OSError):
        return None
    cause, lasts = found.get("cause"), found.get("lasts")
    if not isinstance(cause, str) or not isinstance(lasts, float) or not 0 <= age < lasts:
        return None
    if any(found.get(name) != value for name, value in asdict(way).items()):
        return None
    after = format_duration(lasts - age)
    return f"{cause}; it is tried again in {after}, with another CXX or MAX_JOBS, or once {failed} is deleted"


def _run_compiler(namespace: str, flags: list[str], folder: str) -> None:
    from torch.utils import cpp_extension  # takes a while to import, and is needed once per machine

    sources = [str(path) for path in _sources()]
    logger = logging.getLogger(cpp_extension.__name__)
    path, silent = os.environ.get("PATH", ""), logger.disabled
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])  # where pip puts ninja
    logger.disabled = True  # it warns at length about compilers that PyTorch was not built with
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cpp_extension.load(namespace, sources, flags, build_directory=folder, is_python_module=False)
    finally:
        logger.disabled = silent
        os.environ["PATH"] = path
