"""Attention over the paged cache: each KV codec beside the others and beside PyTorch, on the same numbers, in the same
minutes, with the same threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.errors import NumericsError
from kvist.bench.filled import FilledCache
from kvist.bench.machine import Memory, Samples, facts, in_huge_pages, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.bench.shapes import AttentionShape, attention_shape_named
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import BF16, FP16, FP32, DenseCodec
from kvist.cache.layout import BLOCK_SIZE, Layout, plan_layout
from kvist.cache.manager import Lease
from kvist.cache.spec import Reading
from kvist.cache.step import Tie
from kvist.cache.view import LayerView
from kvist.ops.backend import Backend, select

PREFILL_QUERIES, PREFILL_CONTEXT = 512, 4608
DENSE = {codec.name: codec for codec in (BF16, FP16, FP32)}
_Dense = tuple[Tensor, Tensor]  # keys and values of one layer, [1, H, T, D]
# What is cycled through by each, so that none of it is still in a processor's cache when its turn comes again.
_CYCLE_BYTES = 256 << 20
# Of the largest result: what the types in the cache may lose, and what 2 bits may.
_DENSE_TOLERANCE, _CODED_TOLERANCE = 0.02, 0.6


def run(
    shapes: Sequence[str], contexts: Sequence[int], kvs: Sequence[str], rounds: int = 9, force: str | None = None
) -> Report:
    """Decode at each context, and prefill of 512 at 4,608, for each shape, over each of `kvs`. `force` names a backend.

    The first dense one of `kvs` (bf16, fp16, fp32; bf16 when there is none) is also what PyTorch's attention runs in,
    in whichever of its forms is the fastest here. Raises `ConfigError` for unknown names and `NumericsError` when a
    result is not near PyTorch's.
    """
    full = next((DENSE[kv] for kv in kvs if kv in DENSE), BF16)
    memory = Memory()
    report = Report(facts())
    reads: list[Samples] = []
    for shape in map(attention_shape_named, shapes):
        ops = select("cpu", full.dtype, shape.value_dim, BLOCK_SIZE, force)
        report.machine["operators"] = f"{ops.name} operators ({ops.instruction_set})"
        reads += [_decode(report, _Layers(shape, context, kvs, full, ops), memory, rounds) for context in contexts]
        _prefill(report, _Layers(shape, PREFILL_CONTEXT, kvs, full, ops, most=1), rounds)
    if reads:
        report.machine["read_gb_s"] = Samples(tuple(value for read in reads for value in read.values)).median
    return report


@dataclass(frozen=True)
class _Cached:
    """One choice of codecs over all layers, with the context but its last `queries` tokens committed."""

    kv: str
    cache: FilledCache
    lease: Lease
    views: Sequence[LayerView]

    def read_bytes(self) -> float:
        """What a step reads once, in all layers: blocks through their codec, and the open one as it is."""
        layout, length = self.cache.store.layout, self.lease.length + self.lease.reserved
        if not layout.open_bytes:
            return length * layout.bytes_per_token
        coded = (length - 1) // layout.block_size
        return coded * layout.block_bytes + (length / layout.block_size - coded) * layout.open_bytes


class _Layers:
    """Enough layers of one shape that reading them all goes to memory; at most `most`. All hold the same numbers."""

    def __init__(
        self,
        shape: AttentionShape,
        context: int,
        kvs: Sequence[str],
        full: DenseCodec,
        ops: Backend,
        most: int | None = None,
    ) -> None:
        self.shape, self.context, self.full, self.ops = shape, context, full, ops
        self.scale = shape.key_dim**-0.5
        one = [self._layout(kv, 1) for kv in kvs]
        smallest = min(layout.bytes_for(context) for layout in one)
        self.count = max(2, -(-_CYCLE_BYTES // smallest)) if most is None else most
        self.layouts = [self._layout(kv, self.count) for kv in kvs]
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(context, s.heads, s.dim, generator=generator).to(full.dtype) for s in shape.spec.streams]
        self.k, self.v = (None if len(made) == 1 else made[0]), made[-1]
        self.tie = _tie(shape.value_dim, context) if shape.spec.reading is Reading.TIED else None
        keys = self._keys()
        self.dense: list[_Dense] = [(_by_head(keys), _by_head(self.v)) for _ in range(self.count)]

    def _layout(self, kv: str, layers: int) -> Layout:
        return plan_layout([self.shape.spec] * layers, parse_choice(kv), full=self.full)

    def _keys(self) -> Tensor:
        """As PyTorch's attention takes them."""
        if self.tie is not None:
            return self.tie.keys(self.v.float(), torch.arange(self.context)).to(self.v.dtype)
        assert self.k is not None
        return torch.cat((self.v, self.k), dim=-1) if self.shape.spec.reading is Reading.JOINED else self.k

    def cached(self, layout: Layout, queries: int) -> _Cached:
        """The context in a cache of its own, its last `queries` tokens written and not yet committed."""
        cache = FilledCache.for_one(layout, self.context, self.ops)
        lease = cache.manager.open()
        cache.append(lease, None if self.k is None else self.k[:-queries], self.v[:-queries])
        views = cache.step(lease, queries)
        for view in views:
            view.write(None if self.k is None else self.k[-queries:], self.v[-queries:])
        return _Cached(layout.kv, cache, lease, views)

    def torch_forms(self, q: Tensor) -> list[Callable[[_Dense], Tensor]]:
        """PyTorch's ways to [n, Hq, D] from q of that shape, masks and copies of queries made beforehand."""
        heads, group = self.shape.kv_heads, self.shape.heads // self.shape.kv_heads
        by_head = q.transpose(0, 1)[None].contiguous()
        if len(q) == 1:  # sees everything: the query heads of a KV head may also be rows of one product
            grouped = q.view(1, heads, group, -1)
            return [
                lambda layer: _sdpa(by_head, *layer, None)[0].transpose(0, 1),
                lambda layer: F.scaled_dot_product_attention(grouped, *layer).view(1, *q.shape[1:2], -1),
            ]
        seen = torch.ones(len(q), self.context, dtype=torch.bool).tril(self.context - len(q))
        added = torch.zeros(seen.shape, dtype=self.full.dtype).masked_fill(~seen, -torch.inf)
        return [
            lambda layer: _sdpa(by_head, *layer, seen)[0].transpose(0, 1),
            lambda layer: _sdpa(by_head, *layer, added)[0].transpose(0, 1),
        ]

    def contenders(self, queries: int) -> tuple[list[_Cached], list[Callable[[], None]]]:
        """Kvist's caches; and attention of `queries` queries over all layers, in each and in the fastest of PyTorch's
        forms, which stands last, after comparing their results.
        """
        q = torch.randn(queries, self.shape.heads, self.shape.key_dim).to(self.full.dtype)
        caches = [self.cached(layout, queries) for layout in self.layouts]
        forms = self.torch_forms(q)
        expected = forms[0](self.dense[0]).float()
        for cached in caches:
            self._compare(cached, q, expected)

        def over_views(views: Sequence[LayerView]) -> Callable[[], None]:
            return lambda: [view.attend(q, self.scale, self.tie) for view in views] and None

        def over_dense(form: Callable[[_Dense], Tensor]) -> Callable[[], None]:
            return lambda: [form(layer) for layer in self.dense] and None

        trials = interleave([over_dense(form) for form in forms], 2)
        best = min(range(len(forms)), key=lambda i: min(trials[i].values))
        return caches, [*(over_views(cached.views) for cached in caches), over_dense(forms[best])]

    def _compare(self, cached: _Cached, q: Tensor, expected: Tensor) -> None:
        error = float((cached.views[0].attend(q, self.scale, self.tie).float() - expected).norm() / expected.norm())
        tolerance = _CODED_TOLERANCE if cached.cache.store.layout.open_bytes else _DENSE_TOLERANCE
        if not error < tolerance:
            raise NumericsError(f"attention differs from PyTorch's by {error:.2g} ({self.shape.name}, {cached.kv})")

    def row(self, what: str, engine: str, kv: str, samples: Samples, unit: str) -> Row:
        """Weights take no part in attention."""
        return Row(what, engine, self.shape.name, "none", kv, self.context, 1, samples.median, unit, samples.spread)


def _tie(dim: int, positions: int) -> Tie:
    """Rotations of a quarter of a head's pairs, as Gemma 4 has them, and weights about one."""
    angles = torch.outer(torch.arange(-(-positions // 16) * 16), 10_000.0 ** -torch.linspace(0, 1, dim // 8))
    angles = angles.unflatten(0, (-1, 16)).mT.contiguous()
    return Tie(1 + torch.randn(dim, generator=torch.Generator().manual_seed(1)) / 8, angles.cos(), angles.sin())


def _by_head(x: Tensor) -> Tensor:
    """[T, H, D] → [1, H, T, D] of its own, in huge pages."""
    dense = in_huge_pages([1, x.shape[1], len(x), x.shape[2]], x.dtype)
    dense[0].copy_(x.transpose(0, 1))
    return dense


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _decode(report: Report, layers: _Layers, memory: Memory, rounds: int) -> Samples:
    """One new token. Returns the read bandwidth of the same rounds, in GB/s."""
    what = f"attention decode {layers.shape.name} {layers.context}"
    caches, works = layers.contenders(1)
    *times, torch_time, memory_time = interleave([*works, memory.read], rounds)
    read = memory_time.map(memory.gb_s)
    dense_bytes = sum(x.nbytes for layer in layers.dense for x in layer)
    measured = [("kvist", cached.kv, cached.read_bytes(), time) for cached, time in zip(caches, times, strict=True)]
    for engine, kv, nbytes, seconds in (*measured, ("torch sdpa", layers.full.name, dense_bytes, torch_time)):
        rate = seconds.map(lambda s, nbytes=nbytes: nbytes / s / 1e9)
        per_layer = seconds.map(lambda s: s / layers.count * 1e6)
        report.rows.append(layers.row(what, engine, kv, per_layer, "us a layer"))
        report.rows.append(layers.row(what, engine, kv, rate, "GB/s"))
        report.rows.append(layers.row(what, engine, kv, rate.over(read), "of read bandwidth"))
    report.ratios.extend(_ratios(what, layers, caches, times, torch_time))
    return read


def _prefill(report: Report, layers: _Layers, rounds: int) -> None:
    """The last 512 tokens of a prompt."""
    what = f"attention prefill of {PREFILL_QUERIES} {layers.shape.name} {layers.context}"
    caches, works = layers.contenders(PREFILL_QUERIES)
    *times, torch_time = interleave(works, rounds)
    # Two operations for each number of a key and of a value that a query sees.
    seen = PREFILL_QUERIES * (layers.context - PREFILL_QUERIES) + PREFILL_QUERIES * (PREFILL_QUERIES + 1) // 2
    operations = 2 * layers.shape.heads * (layers.shape.key_dim + layers.shape.value_dim) * seen * layers.count
    measured = [("kvist", cached.kv, time) for cached, time in zip(caches, times, strict=True)]
    for engine, kv, seconds in (*measured, ("torch sdpa", layers.full.name, torch_time)):
        report.rows.append(layers.row(what, engine, kv, seconds.map(lambda s: s * 1e3 / layers.count), "ms a layer"))
        report.rows.append(layers.row(what, engine, kv, seconds.map(lambda s: operations / s / 1e9), "GFLOP/s"))
    report.ratios.extend(_ratios(what, layers, caches, times, torch_time))


def _ratios(
    what: str, layers: _Layers, caches: Sequence[_Cached], times: Sequence[Samples], torch_time: Samples
) -> list[Ratio]:
    """Each cache against PyTorch, and each other one against the first that is dense."""
    full = layers.full.name
    ratios = [
        Ratio(what, f"kvist {cached.kv}", f"torch {full}", torch_time.over(time).median)
        for cached, time in zip(caches, times, strict=True)
    ]
    dense = next((time for cached, time in zip(caches, times, strict=True) if cached.kv == full), None)
    for cached, time in zip(caches, times, strict=True):
        if dense is not None and cached.kv != full:
            ratios.append(Ratio(what, f"kvist {cached.kv}", f"kvist {full}", dense.over(time).median))
    return ratios
