"""Products over packed weights: one row against the memory's read bandwidth, more rows beside oneDNN's int8 product.

Weights are as many copies as no processor's cache holds, taken in turn, so each is read from memory."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvist.bench.machine import Memory, Samples, facts, interleave
from kvist.bench.models import random_model
from kvist.bench.report import Ratio, Report, Row
from kvist.bench.shapes import Shape, shape_named
from kvist.cache.manager import Lease
from kvist.models.linear import PackedOperators, weights_of
from kvist.ops.backend import select
from kvist.ops.memory import zeros
from kvist.ops.packed import PackedForm, group_for, put_rows
from kvist.runtime.batch import Work
from kvist.runtime.runner import Runner

ROWS = (8, 64, 512)
BITS = {"int8": 8, "int4": 4}
_CYCLE_BYTES = 384 << 20
_LIBRARY = "onednn"
# Of a result's root mean square: what 8 bits for weights and rows may change.
_TOLERANCE = 0.03
_STEPS = 8  # that are timed together
_AMOUNT = 2e9  # multiplications and additions that are timed together


def run(shapes: Sequence[str], rounds: int, observe: Callable[[str], None]) -> Report:
    """Every product of each shape's layers. Raises `AssertionError` where ours are wrong; where the library's are, as
    they are without instructions for whole products of bytes, the machine's facts say so."""
    operators, memory, report = select("cpu", torch.float32, 64, 64), Memory(), Report(facts())
    report.machine["operators"] = f"{operators.name} operators ({operators.instruction_set})"
    reads: list[float] = []
    for shape in map(shape_named, shapes):
        for part, (outputs, columns) in _products(shape).items():
            observe(f"{shape.name} {part}: {columns} to {outputs}")
            reads += _one_row(report, shape, part, _Packed(operators, outputs, columns), memory, rounds)
            _more_rows(report, shape, part, operators, outputs, columns, rounds)
        observe(f"{shape.name}: whole steps")
        reads += _steps(report, shape, memory, rounds)
    report.machine["read_gb_s"] = Samples(tuple(reads)).map(memory.gb_s).median
    return report


def _products(shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and columns of the products of one layer, and of the head."""
    heads, inner = shape.heads * shape.head_dim, shape.intermediate
    return {
        "qkv": (heads + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "out": (shape.hidden, heads),
        "gate and up": (2 * inner, shape.hidden),
        "down": (shape.hidden, inner),
        "head": (shape.vocab, shape.hidden),
    }


class _Packed:
    """Copies of one matrix in each form, together larger than any cache."""

    def __init__(self, operators: PackedOperators, outputs: int, columns: int) -> None:
        self.operators, self.row = operators, torch.randn(1, columns)
        self.copies: dict[str, tuple[PackedForm, list[Tensor]]] = {}
        for name, bits in BITS.items():
            form = PackedForm(outputs, columns, bits, group_for(columns, bits))
            one = torch.zeros(form.shape, dtype=torch.uint8)
            put_rows(one, form, 0, torch.randn(outputs, columns))
            copies = zeros([-(-_CYCLE_BYTES // form.nbytes), *form.shape], torch.uint8)
            copies.copy_(one)
            self.copies[name] = form, list(copies)

    def multiply(self, name: str) -> None:
        form, copies = self.copies[name]
        flat = form.flat()
        for codes in copies:
            self.operators.packed_linear(self.row, None, 0.0, codes, flat, None)

    def nbytes(self, name: str) -> int:
        form, copies = self.copies[name]
        return form.nbytes * len(copies)


def _one_row(
    report: Report, shape: Shape, part: str, packed: _Packed, memory: Memory, rounds: int
) -> tuple[float, ...]:
    *times, read = interleave([*(partial(packed.multiply, name) for name in BITS), memory.read], rounds)
    what, bandwidth = f"{shape.name} {part}, 1 row", read.map(memory.gb_s)
    report.rows.append(Row(what, "memory", shape.name, "", "", 0, 1, bandwidth.median, "GB/s", bandwidth.spread))
    for name, time in zip(BITS, times, strict=True):
        nbytes = packed.nbytes(name)
        speed = time.map(lambda s: nbytes / s / 1e9)  # noqa: B023
        report.rows.append(Row(what, f"kvist {name}", shape.name, name, "", 0, 1, speed.median, "GB/s", speed.spread))
        report.ratios.append(Ratio(what, f"kvist {name}", "reading memory", speed.over(bandwidth).median))
    return read.values


def _steps(report: Report, shape: Shape, memory: Memory, rounds: int) -> tuple[float, ...]:
    """Whole steps of one token behind a short context, in which all products of a layer are in one call."""
    steps, weights = [], []
    for name in BITS:
        loaded = random_model(shape.name, "bf16", weights=name)
        runner = Runner(loaded.model, loaded.layout, 4, loaded.backend, sequences=1)
        steps.append(partial(_step, runner, runner.manager.open()))
        read = [weight.form.nbytes for weight in weights_of(loaded.model).values() if weight.form is not None]
        # Of an embedding that is no head only a row is read.
        weights.append(sum(read) - (0 if loaded.config.tied else read[0]))
    *times, read_times = interleave([*steps, memory.read], rounds)
    what, bandwidth = f"{shape.name} whole step, 1 row", read_times.map(memory.gb_s)
    for name, time, nbytes in zip(BITS, times, weights, strict=True):
        speed = time.map(lambda s: nbytes * _STEPS / s / 1e9)  # noqa: B023
        report.rows.append(Row(what, f"kvist {name}", shape.name, name, "", 0, 1, speed.median, "GB/s", speed.spread))
        report.ratios.append(Ratio(what, f"kvist {name}", "reading memory", speed.over(bandwidth).median))
    return read_times.values


def _step(runner: Runner, lease: Lease) -> None:
    for _ in range(_STEPS):
        runner.run([Work(lease, [1], logits=1)])
    runner.manager.rollback(lease, 0)


def _more_rows(
    report: Report, shape: Shape, part: str, operators: PackedOperators, outputs: int, columns: int, rounds: int
) -> None:
    """One matrix that stays wherever it is, as the next rows of a prompt find it."""
    weight = torch.randn(outputs, columns)
    form = PackedForm(outputs, columns, 8, group_for(columns, 8))
    codes = torch.zeros(form.shape, dtype=torch.uint8)
    put_rows(codes, form, 0, weight)
    library = _Library(weight)
    for count in ROWS:
        rows = torch.randn(count, columns)
        ours = partial(operators.packed_linear, rows, None, 0.0, codes, form.flat(), None)
        theirs = partial(library.multiply, rows)
        exact = rows @ weight.T
        off = [float((product() - exact).norm() / exact.norm()) for product in (ours, theirs)]
        assert off[0] < _TOLERANCE, f"{part}, {count} rows: off by {off[0]:.3f}"
        if off[1] >= _TOLERANCE:
            report.machine[_LIBRARY] = f"{_LIBRARY}'s products are wrong here: off by {off[1]:.3f}"
        what, amount = f"{shape.name} {part}, {count} rows", 2 * count * outputs * columns
        repeats = max(1, int(_AMOUNT / amount))
        times = interleave([partial(_repeat, ours, repeats), partial(_repeat, theirs, repeats)], rounds)
        for engine, time in zip(("kvist int8", f"{_LIBRARY} int8"), times, strict=True):
            speed = time.map(lambda s: amount * repeats / s / 1e9)  # noqa: B023
            report.rows.append(Row(what, engine, shape.name, "int8", "", 0, count, speed.median, "GOP/s", speed.spread))
        report.ratios.append(Ratio(what, "kvist int8", f"{_LIBRARY} int8", times[1].over(times[0]).median))


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


class _Library:
    """oneDNN's product of uint8 rows with int8 weights, a scale for each output; rows are brought to 8 bits here, too,
    each with a scale of its own."""

    def __init__(self, weight: Tensor) -> None:
        self._scales = weight.abs().amax(1) / 127
        codes = (weight / self._scales[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def multiply(self, rows: Tensor) -> Tensor:
        scales = rows.abs().amax(1, keepdim=True) / 127
        codes = (rows / scales).round_().add_(128).to(torch.uint8)
        operands = (codes, 1.0, 128, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(*operands, "none", [], "")
        return out.mul_(scales)
