"""Every family passes `verify`: whatever is cached, chunked, batched, taken back or shared, the bits are the same."""

from collections.abc import Callable

import pytest
from hf_checkpoints import CASES, Written

from kvist.evals.trace import trace
from kvist.models.families import load_config
from kvist.service.loaded import open_model
from kvist.testing import check_family


@pytest.mark.parametrize(("kv", "weights"), [("fp32", None), ("turbo4", None), ("fp32", "int8")])
@pytest.mark.parametrize("case", list(CASES))
def test_verify(case: str, kv: str, weights: str | None, written: Callable[[str], Written]) -> None:
    if kv != "fp32" and load_config(written(case).directory).head_dim < 32:
        pytest.skip("lossy codecs hold heads of 32 numbers and more")
    if weights is None:
        for step in trace(open_model(str(written(case).directory), kv=kv), [1, 2, 3]):
            assert {"q", "attention", "logits"} <= {row.name for row in step.tensors}
    check_family(written(case).directory, kv=kv, weights=weights)
