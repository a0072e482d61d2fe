"""The oracle's checkpoints, each written once."""

from collections.abc import Callable

import pytest
from hf_checkpoints import CASES, Written, write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """`written(case)`: not to be changed by a test."""
    made: dict[str, Written] = {}

    def get(case: str) -> Written:
        if case not in made:
            made[case] = write_checkpoint(case, tmp_path_factory.mktemp("written") / case, list(CASES).index(case))
        return made[case]

    return get
