"""Every family passes `verify`: whatever is cached, chunked, batched, taken back or shared, the bits are the same."""

from collections.abc import Callable

import pytest
from hf_checkpoints import CASES, Written

from kvist.evals.trace import trace
from kvist.evals.verify import Verifier
from kvist.models.families import load_config
from kvist.service.loaded import open_model


@pytest.mark.parametrize(("kv", "weights"), [("fp32", None), ("turbo4", None), ("fp32", "int8")])
@pytest.mark.parametrize("case", list(CASES))
def test_verify(case: str, kv: str, weights: str | None, written: Callable[[str], Written]) -> None:
    if kv != "fp32" and load_config(written(case).directory).head_dim < 32:
        pytest.skip("lossy codecs hold heads of 32 numbers and more")
    loaded = open_model(str(written(case).directory), kv=kv, weights=weights)
    for step in trace(loaded, [1, 2, 3]) if weights is None else ():
        assert {"q", "attention", "logits"} <= {row.name for row in step.tensors}
    context = min(loaded.config.max_positions, 200)
    checks = list(Verifier(loaded, length=context - 40, steps=3, trials=2).run())
    assert [check for check in checks if not check.passed] == []
    assert all(check.compared > 0 for check in checks)
