"""Blocks that come back from a folder: the same tokens and the same logits as computed, with proof that they did."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvist.cache.disk import DiskTier
from kvist.cache.kept import KeptCache
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request, Sampling
from kvist.runtime.runner import Runner
from kvist.runtime.sequence import Sequence
from oracle import LLAMA, make_runner, tokens_of

TALL = replace(LLAMA, head_dim=32)
BUDGET = 1 << 30


class Kept:
    """An engine over a folder, whose logits are written down."""

    def __init__(self, folder: Path, kv: str = "fp32", blocks: int = 40, budget: int = BUDGET, identity: bytes = b"a"):
        base = make_runner(LLAMA if kv == "fp32" else TALL, kv=kv)
        runner = Runner(base.model, base.layout, blocks, base.backend, None, 4, tails=4, identity=identity)
        self.disk = DiskTier(folder, budget)
        self.kept = KeptCache([self.disk], base.layout.block_bytes)
        self.engine = Engine(runner, kept=self.kept)
        self.logits: list[Tensor] = []
        run = runner.run

        def noted(works):  # type: ignore[no-untyped-def]
            found = run(works)
            self.logits += [rows[-1].clone() for rows in found if len(rows)]
            return found

        runner.run = noted  # type: ignore[method-assign]

    def ask(self, prompt: list[int], new: int = 6, **more: object) -> Sequence:
        sequence = self.engine.add(Request(tuple(prompt), new, Sampling(temperature=1.0, seed=3), **more))  # type: ignore[arg-type]
        self.run()
        return sequence

    def run(self) -> None:
        while not self.engine.idle:
            self.engine.step()
            self.engine.check()

    def end(self) -> None:
        assert self.engine.keeper.flush(30)
        self.disk.check()
        self.kept.close()
        self.disk.close()


@pytest.mark.parametrize("kv", ["fp32", "turbo4", "int8"])
def test_after_a_restart_a_prompt_is_read_and_goes_on_with_the_same_bits(kv: str, tmp_path: Path) -> None:
    prompt = tokens_of(random.Random(1), 500)
    first = Kept(tmp_path, kv)
    cold = first.ask(prompt)
    assert cold.cached.tiers == {"memory": 0}
    first.end()
    again = Kept(tmp_path, kv)
    warm = again.ask(prompt)
    assert warm.cached.tiers["disk"] == 448
    assert again.kept.counters.hits["disk"] == 7
    assert again.engine.counters.computed == 500 - 448 + 5
    assert warm.new_tokens == cold.new_tokens
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    again.end()
