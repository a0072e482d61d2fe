"""The oracle's checkpoints, each written once."""

from collections.abc import Callable
from zlib import crc32

import pytest
from hf_checkpoints import Written, write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """`written(case)`: not to be changed by a test."""
    made: dict[str, Written] = {}

    def get(case: str) -> Written:
        if case not in made:
            made[case] = write_checkpoint(case, tmp_path_factory.mktemp("written") / case, crc32(case.encode()))
        return made[case]

    return get
