"""One step's work as tensors. The only place that pads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.manager import Lease
from kvist.cache.view import Step
from kvist.runtime.widths import Widths


@dataclass(frozen=True)
class Work:
    """The next `tokens` of one sequence, to be written behind its lease's committed ones.

    `logits`: of how many of them, counted from the last, the logits are wanted.
    """

    lease: Lease
    tokens: Sequence[int]
    logits: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.logits <= len(self.tokens):
            raise ValueError(f"a step of {len(self.tokens)} tokens has no {self.logits} rows of logits")


@dataclass(frozen=True)
class Batch:
    """`tokens`, `positions` `[width]` int64; `logit_rows`: the rows whose logits are wanted, in order."""

    tokens: Tensor
    positions: Tensor
    step: Step
    logit_rows: list[int]


def pad_rows(rows: list[int], widths: Widths) -> Tensor:
    """Row numbers `[width]` int64 with row 0 repeated behind them."""
    return torch.tensor(rows + [0] * (widths.fit(len(rows)) - len(rows)))


def build_batch(works: Sequence[Work], block_size: int, widths: Widths) -> Batch:
    """Lay reserved works side by side, one row a token, and pad rows to a width that keeps every bit.

    Padding rows hold token 0 at position 0; they are written nowhere (slot -1) and attend to nothing.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    rows: list[int] = []
    for work in works:
        first, table = work.lease.length, work.lease.table
        tokens += work.tokens
        span = range(first, first + len(work.tokens))
        positions += span
        slots += [table[position // block_size] * block_size + position % block_size for position in span]
        starts.append(len(tokens))
        rows += range(len(tokens) - work.logits, len(tokens))
    padding = widths.fit(len(tokens)) - len(tokens)
    longest = max(len(work.lease.table) for work in works)
    tables = torch.zeros(len(works), longest, dtype=torch.int32)
    for index, work in enumerate(works):
        tables[index, : len(work.lease.table)] = torch.tensor(work.lease.table, dtype=torch.int32)
    step = Step(
        slots=torch.tensor(slots + [-1] * padding),
        tables=tables,
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor([work.lease.length + len(work.tokens) for work in works], dtype=torch.int32),
    )
    return Batch(
        tokens=torch.tensor(tokens + [0] * padding),
        positions=torch.tensor(positions + [0] * padding),
        step=step,
        logit_rows=rows,
    )
