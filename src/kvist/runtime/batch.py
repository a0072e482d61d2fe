"""One step's work as tensors. The only place that pads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.base.errors import InvariantError
from kvist.cache.manager import Lease
from kvist.cache.step import OpenStep, Step
from kvist.runtime.widths import Widths


@dataclass(frozen=True)
class Work:
    """The next `tokens` of one sequence, to be written behind its lease's committed ones.

    `logits`: of how many of them, counted from the last, the logits are wanted. `pool`: `[hidden_size]` float64 to
    which their last hidden states are added, one after the other, so that the sum does not depend on the steps.
    `adapter`: the id of the one that they have, if any."""

    lease: Lease
    tokens: Sequence[int]
    logits: int = 1
    pool: Tensor | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.logits <= len(self.tokens):
            raise ValueError(f"a step of {len(self.tokens)} tokens has no {self.logits} rows of logits")


@dataclass(frozen=True)
class Batch:
    """`tokens`, `positions` `[width]` int64, of which the first `rows` are no padding; `logit_rows`: the rows whose
    logits are wanted, in order."""

    tokens: Tensor
    positions: Tensor
    step: Step
    rows: int
    logit_rows: list[int]


def pad_rows(rows: list[int], widths: Widths) -> Tensor:
    """Row numbers `[width]` int64 with row 0 repeated behind them."""
    return torch.tensor(rows + [0] * (widths.fit(len(rows)) - len(rows)))


def build_batch(
    works: Sequence[Work], block_size: int, widths: Widths, passing: int | None = None, windows: int = 0
) -> Batch:
    """Lay reserved works side by side, one row a token, and pad rows to a width that keeps every bit.

    Padding rows hold token 0 at position 0; they are written nowhere (slot -1) and attend to nothing. `passing`: how
    many passing blocks the store has where codecs are lossy, else None. `windows`: groups of layers that have one.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[list[int]] = [[] for _ in range(1 + windows)]
    starts = [0]
    rows: list[int] = []
    for work in works:
        first = work.lease.length
        tokens += work.tokens
        span = range(first, first + len(work.tokens))
        positions += span
        table = work.lease.table
        slots[0] += [table[position // block_size] * block_size + position % block_size for position in span]
        for held, into in zip(work.lease.windows, slots[1:], strict=True):
            into += [held[position // block_size] * block_size + position % block_size for position in span]
        starts.append(len(tokens))
        rows += range(len(tokens) - work.logits, len(tokens))
    padding = widths.fit(len(tokens)) - len(tokens)
    step = Step(
        slots=[torch.tensor(own + [-1] * padding) for own in slots],
        tables=_tables(works, windows),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor([work.lease.length + len(work.tokens) for work in works], dtype=torch.int32),
        open=None if passing is None else _open_step(works, block_size, padding, passing),
    )
    return Batch(
        tokens=torch.tensor(tokens + [0] * padding),
        positions=torch.tensor(positions + [0] * padding),
        step=step,
        rows=len(tokens),
        logit_rows=rows,
    )


def _tables(works: Sequence[Work], windows: int) -> list[Tensor]:
    """Each group's block tables `[S, blocks]` int32, -1 where a block is gone, and behind the end of a table."""
    longest = max(len(work.lease.table) for work in works)
    tables = [torch.full((len(works), longest), -1, dtype=torch.int32) for _ in range(1 + windows)]
    for index, work in enumerate(works):
        tables[0][index, : len(work.lease.table)] = torch.tensor(work.lease.table, dtype=torch.int32)
        for table, held in zip(tables[1:], work.lease.windows, strict=True):
            table[index, list(held)] = torch.tensor(list(held.values()), dtype=torch.int32)
    return tables


def _open_step(works: Sequence[Work], block_size: int, padding: int, passing: int) -> OpenStep:
    """The blocks that the works write, in the order of rows. Those a lease does not keep open pass by."""
    tables: list[int] = []
    lengths: list[int] = []
    offsets: list[int] = []
    slots: list[int] = []
    starts = [0]
    sources: list[int] = []
    targets: list[list[int]] = [[] for _ in range(1 + len(works[0].lease.windows))]
    passed = 0
    for work in works:
        first, end = work.lease.length, work.lease.length + len(work.tokens)
        for index in range(first // block_size, -(-end // block_size)):
            kept = work.lease.open.get(index)
            block = passed if kept is None else passing + kept
            passed += kept is None
            start, stop = index * block_size, min(end, (index + 1) * block_size)
            slots += range(block * block_size + max(first, start) - start, block * block_size + stop - start)
            tables.append(block)
            lengths.append(stop - start)
            offsets.append(start)
            starts.append(len(slots))
            if stop - start == block_size:
                sources.append(block)
                targets[0].append(work.lease.table[index])
                for held, into in zip(work.lease.windows, targets[1:], strict=True):
                    into.append(held[index])
    if passed > passing:
        raise InvariantError(f"a step fills {passed} blocks whole and the store has {passing} for them")
    return OpenStep(
        slots=torch.tensor(slots + [-1] * padding),
        tables=torch.tensor(tables, dtype=torch.int32)[:, None],
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        sources=torch.tensor(sources, dtype=torch.int64),
        targets=[torch.tensor(own, dtype=torch.int64) for own in targets],
    )
