"""What the tests of several layers share: data beside the repository, backends, one thread, the same examples."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kvist.base.errors import BackendError
from kvist.cache.layout import BLOCK_SIZE
from kvist.ops.backend import select

REPOSITORY = Path(__file__).parent.parent

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and no example too slow for a busy machine.
settings.register_profile("kvist", derandomize=True, database=None, deadline=None)
settings.load_profile("kvist")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and checkpoints that stands beside the repository where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Every test draws the same random numbers in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models here are so small that threads would mostly wait for each other; a test of threads sets its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def backend_name(request: pytest.FixtureRequest) -> str:
    """Each implementation of the operators that runs here."""
    try:
        select("cpu", torch.float32, 8, BLOCK_SIZE, request.param)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    return str(request.param)
