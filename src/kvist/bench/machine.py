"""The machine that a benchmark runs on, and timing that survives a noisy one."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_READ_BYTES = 256 << 20  # beyond any cache
_HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile; of a single measurement, itself."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4)
        return first, third

    def map(self, function: Callable[[float], float]) -> "Samples":
        return Samples(tuple(function(value) for value in self.values))

    def over(self, other: "Samples") -> "Samples":
        """Ratios of measurements of the same round: what disturbed both cancels."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


def interleave(functions: Sequence[Callable[[], object]], rounds: int) -> list[Samples]:
    """Seconds of each function: one call each per round, every other round backwards, after one that is not counted."""
    seconds: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        order = list(enumerate(functions))
        for index, function in order if number % 2 else reversed(order):
            start = time.perf_counter()
            function()
            if number:
                seconds[index].append(time.perf_counter() - start)
    return [Samples(tuple(values)) for values in seconds]


def in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros from numpy, which asks for huge pages, beginning with one."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.zeros(count + _HUGE_PAGE, np.uint8)
    start = -raw.ctypes.data % _HUGE_PAGE
    return torch.from_numpy(raw[start : start + count]).view(dtype).view(tuple(shape))


class Memory:
    """Reads a buffer that no cache holds, with PyTorch's threads."""

    def __init__(self) -> None:
        self.buffer = in_huge_pages([_READ_BYTES // 4], torch.float32).fill_(1)

    def read(self) -> None:
        self.buffer.sum()

    def gb_s(self, seconds: float) -> float:
        """The bandwidth, when `read` took so long."""
        return _READ_BYTES / seconds / 1e9


def facts() -> dict[str, str | float]:
    """What a reader needs to know about this machine."""
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()} cores",
        "threads": f"{torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
