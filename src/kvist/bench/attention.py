"""Attention over the paged cache beside PyTorch's, on the same numbers, in the same minutes, with the same threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.errors import ConfigError, NumericsError
from kvist.bench.machine import Memory, Samples, facts, in_huge_pages, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.bench.shapes import Shape, shape_named
from kvist.ops.backend import Backend, select
from kvist.ops.packing import key_plane_shape, value_plane_shape

BLOCK_SIZE = 64
PREFILL_QUERIES, PREFILL_CONTEXT = 512, 4608
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LAYER_BYTES = 128 << 20  # keys and values that are cycled through, so that none is still in a cache


def run(
    shapes: Sequence[str], contexts: Sequence[int], kv: str = "bf16", rounds: int = 9, force: str | None = None
) -> Report:
    """Decode at each context, and prefill of 512 at 4,608, for each shape. `force` names a backend.

    PyTorch's attention runs in whichever of its forms is the fastest here. Raises `ConfigError` for unknown names and
    `NumericsError` when the two do not agree.
    """
    if kv not in DTYPES:
        raise ConfigError(f"there is no KV type {kv!r} to compare with PyTorch; choose one of {', '.join(DTYPES)}")
    memory = Memory()
    report = Report(facts())
    reads: list[Samples] = []
    for shape in map(shape_named, shapes):
        ops = select("cpu", DTYPES[kv], shape.head_dim, BLOCK_SIZE, force)
        report.machine["operators"] = f"{ops.name} operators ({ops.instruction_set})"
        reads += [_decode(report, _Layers(shape, context, kv, ops), memory, rounds) for context in contexts]
        _prefill(report, _Layers(shape, PREFILL_CONTEXT, kv, ops, most=1), rounds)
    if reads:
        report.machine["read_gb_s"] = Samples(tuple(value for read in reads for value in read.values)).median
    return report


@dataclass(frozen=True)
class _Layer:
    """The same keys and values twice: dense `[1, H, T, D]`, and in planes."""

    dense: tuple[Tensor, Tensor]
    planes: tuple[Tensor, Tensor]


class _Layers:
    """Enough layers of one shape that reading them all goes to memory; at most `most`."""

    def __init__(self, shape: Shape, context: int, kv: str, ops: Backend, most: int | None = None) -> None:
        self.shape, self.context, self.kv, self.ops = shape, context, kv, ops
        self.dtype = DTYPES[kv]
        self.layer_bytes = 2 * context * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        self.scale = shape.head_dim**-0.5
        blocks = -(-context // BLOCK_SIZE)
        self.table = torch.arange(blocks, dtype=torch.int32)[None]
        count = max(2, -(-_LAYER_BYTES // self.layer_bytes)) if most is None else most
        self.layers = [self._layer(blocks) for _ in range(count)]

    def _layer(self, blocks: int) -> _Layer:
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        dense = [in_huge_pages([1, heads, self.context, dim], self.dtype).normal_() for _ in range(2)]
        keys = in_huge_pages(key_plane_shape(blocks, heads, BLOCK_SIZE, dim, self.dtype), self.dtype)
        values = in_huge_pages(value_plane_shape(blocks, heads, BLOCK_SIZE, dim, self.dtype), self.dtype)
        k, v = (x[0].transpose(0, 1) for x in dense)
        self.ops.write(keys, values, k, v, torch.arange(self.context))
        return _Layer((dense[0], dense[1]), (keys, values))

    def queries(self, count: int) -> Tensor:
        """[count, Hq, D] in the type of the cache."""
        return torch.randn(count, self.shape.heads, self.shape.head_dim).to(self.dtype)

    def kvist(self, q: Tensor) -> Callable[[_Layer], Tensor]:
        """Attention of q [n, Hq, D] at the last n positions over a layer's planes."""
        starts = torch.tensor([0, len(q)], dtype=torch.int32)
        lengths = torch.tensor([self.context], dtype=torch.int32)

        def attend(layer: _Layer) -> Tensor:
            return self.ops.attend(q, *layer.planes, self.table, starts, lengths, self.scale)

        return attend

    def torch_forms(self, q: Tensor) -> list[Callable[[_Layer], Tensor]]:
        """PyTorch's ways to the same [n, Hq, D], masks and copies of queries made beforehand."""
        heads, group = self.shape.kv_heads, self.shape.heads // self.shape.kv_heads
        by_head = q.transpose(0, 1)[None].contiguous()
        if len(q) == 1:  # sees everything: the query heads of a KV head may also be rows of one product
            grouped = q.view(1, heads, group, -1)
            return [
                lambda layer: _sdpa(by_head, *layer.dense, None)[0].transpose(0, 1),
                lambda layer: F.scaled_dot_product_attention(grouped, *layer.dense).view(q.shape),
            ]
        seen = torch.ones(len(q), self.context, dtype=torch.bool).tril(self.context - len(q))
        added = torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, -torch.inf)
        return [
            lambda layer: _sdpa(by_head, *layer.dense, seen)[0].transpose(0, 1),
            lambda layer: _sdpa(by_head, *layer.dense, added)[0].transpose(0, 1),
        ]

    def over_all(self, attend: Callable[[_Layer], Tensor]) -> Callable[[], None]:
        def work() -> None:
            for layer in self.layers:
                attend(layer)

        return work

    def pair(self, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
        """Kvist's attention of `count` queries over all layers, and the fastest of PyTorch's, after comparing them."""
        q = self.queries(count)
        kvist, forms = self.kvist(q), self.torch_forms(q)
        expected = forms[0](self.layers[0]).float()
        error = float((kvist(self.layers[0]).float() - expected).abs().max())
        if not error < 0.02 * float(expected.abs().max()):
            raise NumericsError(f"attention differs from PyTorch's by {error:.2g} ({self.shape.name}, {self.kv})")
        trials = interleave([self.over_all(form) for form in forms], 2)
        best = min(range(len(forms)), key=lambda i: min(trials[i].values))
        return self.over_all(kvist), self.over_all(forms[best])

    def row(self, what: str, engine: str, samples: Samples, unit: str) -> Row:
        """Weights take no part in attention."""
        return Row(
            what, engine, self.shape.name, "none", self.kv, self.context, 1, samples.median, unit, samples.spread
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _decode(report: Report, layers: _Layers, memory: Memory, rounds: int) -> Samples:
    """One new token. Returns the read bandwidth of the same rounds, in GB/s."""
    what = f"attention decode {layers.shape.name} {layers.context}"
    kvist, torch_best = layers.pair(1)
    times = interleave([kvist, torch_best, memory.read], rounds)
    read = times[2].map(memory.gb_s)
    moved = layers.layer_bytes * len(layers.layers) / 1e9
    for engine, seconds in (("kvist", times[0]), ("torch sdpa", times[1])):
        rate = seconds.map(lambda s: moved / s)
        report.rows.append(layers.row(what, engine, seconds.map(lambda s: s / len(layers.layers) * 1e6), "us a layer"))
        report.rows.append(layers.row(what, engine, rate, "GB/s"))
        report.rows.append(layers.row(what, engine, rate.over(read), "of read bandwidth"))
    report.ratios.append(_ratio(what, layers.kv, times[0], times[1]))
    return read


def _prefill(report: Report, layers: _Layers, rounds: int) -> None:
    """The last 512 tokens of a prompt."""
    what = f"attention prefill of {PREFILL_QUERIES} {layers.shape.name} {layers.context}"
    times = interleave(layers.pair(PREFILL_QUERIES), rounds)
    # Two products of two operations for each key that a query sees.
    seen = PREFILL_QUERIES * (layers.context - PREFILL_QUERIES) + PREFILL_QUERIES * (PREFILL_QUERIES + 1) // 2
    operations = 4 * layers.shape.heads * layers.shape.head_dim * seen * len(layers.layers)
    for engine, seconds in (("kvist", times[0]), ("torch sdpa", times[1])):
        report.rows.append(layers.row(what, engine, seconds.map(lambda s: s * 1e3), "ms a layer"))
        report.rows.append(layers.row(what, engine, seconds.map(lambda s: operations / s / 1e9), "GFLOP/s"))
    report.ratios.append(_ratio(what, layers.kv, times[0], times[1]))


def _ratio(what: str, kv: str, kvist: Samples, other: Samples) -> Ratio:
    return Ratio(what, f"kvist {kv}", f"torch {kv}", other.over(kvist).median)
