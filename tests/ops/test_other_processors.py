"""The kernels compile for processors that this machine is not: each has branches of the source that no other has."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvist.base.errors import BackendError
from kvist.ops import build

# AVX2 alone; AVX-512 without, and with, its instructions for bytes; with BF16; with AMX's tiles.
PROCESSORS = ("x86-64-v3", "skylake-avx512", "icelake-server", "cooperlake", "sapphirerapids")


def compiled(source: Path, processor: str, folder: Path) -> str:
    """What the compiler says against it."""
    from torch.utils.cpp_extension import include_paths

    flags = [flag for flag in build._FLAGS if not flag.startswith("-O")]
    included = [part for path in include_paths() for part in ("-isystem", path)]
    command = [build._way().compiler, "-std=c++20", "-O1", "-fPIC", "-fopenmp", "-w", *flags, *included]
    command += [f"-march={processor}", "-DKVIST_NAMESPACE=kvist_other", "-c", str(source)]
    ended = subprocess.run([*command, "-o", str(folder / f"{source.stem}.o")], capture_output=True, text=True)
    return "" if ended.returncode == 0 else f"{source.name}: {ended.stderr[-2000:] or ended.returncode}"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are processors of another architecture")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_source_compiles(processor: str, tmp_path: Path) -> None:
    try:
        known = [build._way().compiler, f"-march={processor}", "-E", "-x", "c++", os.devnull]
    except BackendError as error:
        pytest.skip(str(error))
    if subprocess.run(known, capture_output=True).returncode:
        pytest.skip(f"this compiler does not know {processor}")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        said = list(threads.map(lambda source: compiled(source, processor, tmp_path), build._sources()))
    assert not any(said), "\n".join(said)
    assert len(list(tmp_path.glob("*.o"))) == len(build._sources())
