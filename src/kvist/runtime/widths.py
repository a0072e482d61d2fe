"""How many rows a step may have so that every row's bits are the same whatever stands beside it.

A library's matrix product may sum in another order when the number of rows changes (seen: one or two rows, where
it calls a matrix-vector routine; small products in bfloat16, where the size decides between two libraries). So
steps are padded to one of few widths, and each width is tested on this machine, for the shapes of this model's
weights: widths that differ from each other in a single bit are not used together.
"""

import contextlib
import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.errors import BackendError, KvistError
from kvist.base.files import atomic_file, writable_cache_folder

# The head's products are the widest by far, so fewer and narrower widths are tried for them.
HEAD_LADDER = (4, 8, 16, 32, 64)
LADDER = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MOST_BYTES = 4096  # of a file that keeps what was found
_PROCESSOR = {"vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "cache size", "flags"}
_CHOOSING = ("ATEN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH_")  # beginnings of environment variables
_PATTERN = 64  # distinct rows of a test weight, so that a large one is quickly made


@dataclass(frozen=True)
class Widths:
    """The widths that agree, ascending."""

    agreeing: Sequence[int]

    @property
    def most(self) -> int:
        """The most tokens of one step."""
        return self.agreeing[-1]

    def fit(self, rows: int) -> int:
        """The narrowest width that holds `rows` rows."""
        place = bisect_left(self.agreeing, rows)
        if place == len(self.agreeing):
            raise ValueError(f"a step of {rows} rows is wider than {self.most}")
        return self.agreeing[place]


@dataclass(frozen=True)
class _Shape:
    """All of a product that decides how a library computes it: `[rows, columns]` times `[outputs, columns]`."""

    outputs: int
    columns: int
    dtype: torch.dtype
    bias: bool


def widths_folder() -> Path:
    """Where every process of this user keeps what it found."""
    return writable_cache_folder() / "widths"


def probe(
    products: Iterable[tuple[Tensor, Tensor | None]], ladder: tuple[int, ...] = LADDER, folder: Path | None = None
) -> Widths:
    """Of `ladder`, the most widths that agree on every product (weight `[out, in]`, bias `[out]` or none). `folder`:
    where what was found is kept for the next process on this machine.

    Only shapes and dtypes are read of the products, so damaged weights change nothing. Raises `BackendError` when
    rows differ even within one width. Where there is no product, every width does: ours do not depend on it.
    """
    shapes = dict.fromkeys(
        _Shape(len(weight), weight.shape[1], weight.dtype, bias is not None) for weight, bias in products
    )
    if not shapes:
        return Widths(range(1, ladder[-1] + 1))
    return Widths(_known(tuple(shapes), ladder, torch.get_num_threads(), folder))


@cache
def _known(shapes: tuple[_Shape, ...], ladder: tuple[int, ...], threads: int, folder: Path | None) -> tuple[int, ...]:
    """Found in the folder, or measured, once a process."""
    if folder is None:
        return _most_agreeing(shapes, ladder, threads)
    facts = [_machine(), threads, [repr(shape) for shape in shapes], ladder]
    path = folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with path.open("rb") as file:
            kept = json.loads(file.read(_MOST_BYTES))
        if isinstance(kept, list) and kept and kept == [width for width in ladder if width in kept]:
            return tuple(kept)
    found = _most_agreeing(shapes, ladder, threads)
    with contextlib.suppress(KvistError, OSError), atomic_file(path) as target:  # it is only slower next time
        target.write_text(json.dumps(found))
    return found


@cache
def _machine() -> list[str]:
    """All that decides which routine of a library computes a product, but the product itself."""
    with contextlib.suppress(OSError):
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        kinds = [line for line in processor if line.partition("\t")[0] in _PROCESSOR]
        chosen = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_CHOOSING)]
        return [torch.__config__.show(), torch.get_float32_matmul_precision(), *kinds, *chosen]
    return [os.urandom(16).hex()]  # a machine that does not say what it is: nothing is kept of it


def _most_agreeing(shapes: tuple[_Shape, ...], ladder: tuple[int, ...], threads: int) -> tuple[int, ...]:
    """A fact of this machine and PyTorch, and of how many `threads` share a product."""
    # Few outputs show less of a difference, so such products are tested with more weights.
    tests = [shape for shape in shapes for _ in range(max(1, 256 // shape.outputs))]
    best: tuple[int, ...] = ()
    for start in range(len(ladder)):
        if len(best) >= len(ladder) - start:
            break
        best = max(best, _agreeing(tests, ladder[start:]), key=len)
    if not best:
        sizes = ", ".join(f"{shape.columns} to {shape.outputs}" for shape in shapes)
        raise BackendError(
            "on this machine a row's bits depend on its place in a step, so nothing can be exact, for one of this "
            f"model's matrix products ({sizes} numbers); try another dtype"
        )
    return best


def _agreeing(tests: list[_Shape], ladder: tuple[int, ...]) -> tuple[int, ...]:
    """The widths whose rows have the bits that they have in the narrowest; none when that itself is inconsistent."""
    agreeing, narrowest = ladder, ladder[0]
    generator = torch.Generator().manual_seed(0)
    for shape in tests:
        rows, weight, bias = _cancelling(shape, 4 * narrowest, generator)
        standard = torch.cat([F.linear(part, weight, bias) for part in rows.split(narrowest)])
        # No row stands where it stood in the standard, so that a row's place within a width is tested as well.
        order = (5 * torch.arange(agreeing[-1]) + 1) % len(rows)
        agreeing = tuple(
            width
            for width in agreeing
            if torch.equal(F.linear(rows[order[:width]], weight, bias), standard[order[:width]])
        )
        if narrowest not in agreeing:
            return ()
    return agreeing


def _cancelling(shape: _Shape, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """`count` rows, a weight and a bias whose exact products are nothing but the bias: columns cancel in pairs.

    What a sum leaves then is its own rounding, at the accumulator's precision, and that differs with the order of the
    sum. The rounding of an ordinary result to bfloat16 would hide the difference in all but a few of thousands.
    """

    def normal(*size: int) -> Tensor:
        return torch.empty(size).normal_(generator=generator)

    pairs = shape.columns // 2
    first, second = torch.randperm(shape.columns, generator=generator)[: 2 * pairs].view(2, pairs)
    rows = torch.zeros(count, shape.columns, dtype=shape.dtype)
    rows[:, first] = rows[:, second] = (8 * normal(count, pairs)).to(shape.dtype)
    pattern = torch.zeros(min(_PATTERN, shape.outputs), shape.columns, dtype=shape.dtype)
    pattern[:, first] = (8 * normal(len(pattern), pairs)).to(shape.dtype)
    pattern[:, second] = -pattern[:, first]
    weight = pattern.repeat(-(-shape.outputs // len(pattern)), 1)[: shape.outputs]
    # As small as those residues, so that it matters when it is added.
    bias = (1e-4 * normal(shape.outputs)).to(shape.dtype) if shape.bias else None
    return rows, weight, bias
