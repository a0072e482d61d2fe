"""The C++ kernels as a library: compiled once per machine and PyTorch, afterwards loaded in milliseconds.

The library lies in `cache_folder()/ops/<digest>`, where the digest covers all that its machine code depends on, so a
changed source, PyTorch or processor is another library. It is built in a temporary folder under a lock and renamed
into place: it is there whole or not at all, also when several processes start at once or one is killed.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from pathlib import Path

import torch

from kvist.base.errors import BackendError, KvistError
from kvist.base.files import atomic_file, cache_folder

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    "-O3",
    "-ffp-contract=off",  # the order of roundings is part of the result
    "-fno-strict-aliasing",  # scores become weights, and bytes become pairs, in place
    "-fwrapv",  # whole numbers run over where a number is not finite, which the floats beside them show
    "-fvisibility=hidden",  # two builds of one source may be loaded side by side
    "-Wno-psabi",
)
_USUAL_SECONDS = 25


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
    folder = cache_folder() / "ops" / _digest(flags)
    library = folder / f"{namespace}.so"
    if not library.exists():
        with _locked(folder):
            if not library.exists():
                _compile(namespace, flags, library)
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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the lock falls with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(namespace: str, flags: list[str], library: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise BackendError(f"there is no C++ compiler {compiler!r}; install g++, or name one in CXX")
    if sys.stderr.isatty():
        print(f"kvist: compiling the CPU kernels (once, about {_USUAL_SECONDS} s)", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            _run_compiler(namespace, flags, folder)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # with what ninja and the compiler said
            log = library.with_suffix(".log")
            log.write_text(str(error))
            raise BackendError(f"the C++ kernels did not compile; the compiler's messages are in {log}") from error
        # Moved, not copied: PyTorch has already loaded this very file, and loading it by its new name is then free.
        with atomic_file(library) as target:
            os.replace(Path(folder) / library.name, target)


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
