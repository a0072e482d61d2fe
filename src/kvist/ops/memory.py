"""Memory for large tensors."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CACHE_LINE = 64  # bytes


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that begin at a cache line. Raises `MemoryError`.

    numpy's are calloc's: untouched pages cost nothing, and large arrays ask for huge pages. They begin wherever
    malloc's header ends, so a vector would span two cache lines."""
    count = math.prod(shape) * dtype.itemsize
    raw = np.zeros(count + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return torch.from_numpy(raw[start : start + count]).view(dtype).view(tuple(shape))
