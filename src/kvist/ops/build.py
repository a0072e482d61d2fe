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
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path

import torch

from kvist.base.errors import BackendError, KvistError
from kvist.base.files import atomic_file, cache_folder, check_own_file, make_folders, own_folder, read_json
from kvist.base.units import format_bytes

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-O3",
    "-ffp-contract=off",  # the order of roundings is part of the result
    "-fno-strict-aliasing",  # scores become weights, and bytes become pairs, in place
    "-fwrapv",  # whole numbers run over where a number is not finite, which the floats beside them show
    "-fvisibility=hidden",  # two builds of one source may be loaded side by side
    "-Wno-psabi",
)
_USUAL_SECONDS = 60
_NEEDED = 64 << 20  # bytes that a compilation takes on disk for a while
_REMEMBERED = 86_400.0  # seconds for which one that failed is not tried again


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
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(namespace: str, flags: list[str], library: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise BackendError(
            f"there is no C++ compiler {os.environ.get('CXX', 'c++')!r}; install g++, or name one in CXX"
        )
    if (free := shutil.disk_usage(library.parent).free) < _NEEDED:
        raise BackendError(
            f"the disk is full: compiling the C++ kernels takes {format_bytes(_NEEDED)} in {library.parent}, "
            f"where {format_bytes(free)} are free"
        )
    failed = library.with_suffix(".failed.json")
    if cause := _remembered(failed, compiler):
        raise BackendError(f"{cause}; it is tried again after a day, with another CXX, or once {failed} is deleted")
    print(f"kvist: compiling the CPU kernels (once, about {_USUAL_SECONDS} s)", file=sys.stderr, flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            _run_compiler(namespace, flags, folder)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # with what ninja and the compiler said
            log = library.with_suffix(".log")
            cause, lasts = _cause(str(error), log)
            with contextlib.suppress(OSError, KvistError):  # a full disk takes neither
                log.write_text(str(error))
                if lasts:
                    with atomic_file(failed) as target:
                        target.write_text(json.dumps({"cause": cause, "compiler": compiler}))
            raise BackendError(cause) from error
        # Moved, not copied: PyTorch has already loaded this very file, and loading it by its new name is then free.
        with atomic_file(library) as target:
            os.replace(Path(folder) / library.name, target)
    failed.unlink(missing_ok=True)
    print(f"kvist: the CPU kernels are compiled ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)


def _cause(messages: str, log: Path) -> tuple[str, bool]:
    """Why a compilation failed, in one line, and whether it would fail again."""
    if "No space left on device" in messages or "Disk quota exceeded" in messages:
        return f"the C++ kernels did not compile: the disk is full; make room for {log.parent} and start again", False
    if "Killed" in messages or "terminated signal" in messages:
        return "the C++ kernels did not compile: the compiler was killed, as happens where memory is short", False
    first = next((f": {line.strip()[:200]}" for line in messages.splitlines() if "error:" in line), "")
    return f"the C++ kernels did not compile{first}; the compiler's messages are in {log}", True


def _remembered(failed: Path, compiler: str) -> str | None:
    """The cause for which this compiler failed within the last day, or None."""
    try:
        if not 0 <= time.time() - failed.stat().st_mtime < _REMEMBERED:
            return None
        found = read_json(failed, 1 << 16)
    except (KvistError, OSError):
        return None
    return str(found.get("cause")) if found.get("compiler") == compiler else None


def _run_compiler(namespace: str, flags: list[str], folder: str) -> None:
    from torch.utils import cpp_extension  # takes a while to import, and is needed once per machine

    sources = [str(path) for path in sorted(_SOURCES.glob("*.cpp"))]
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
