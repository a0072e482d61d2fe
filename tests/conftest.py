"""What the tests of several layers share: data beside the repository, backends, small random models."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvist.base.errors import BackendError
from kvist.cache.layout import BLOCK_SIZE
from kvist.models.config import ModelConfig
from kvist.ops.backend import select
from kvist.runtime.runner import Runner
from oracle import LLAMA, make_runner

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts and checkpoints that stands beside the repository where there is one."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


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


@pytest.fixture
def tiny_runner() -> Callable[..., Runner]:
    """Runners of small random models: `tiny_runner(config, dtype, kv, blocks, backend)`, all with defaults."""

    def make(
        config: ModelConfig = LLAMA,
        dtype: torch.dtype = torch.float32,
        kv: str = "fp32",
        blocks: int = 40,
        backend: str | None = None,
    ) -> Runner:
        return make_runner(config, dtype, kv, blocks, backend)

    return make
