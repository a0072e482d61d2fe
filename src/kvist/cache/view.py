"""All that a model sees of the cache: write this step's vectors, attend over everything before and including them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from kvist.cache.decoded import Sequences, attend_decoded, seal_decoded
from kvist.cache.layout import LayerLayout
from kvist.cache.spec import Reading, Role, window_of
from kvist.cache.step import OpenStep, Step, Tie
from kvist.cache.store import OpenPlanes, Store
from kvist.cache.streams import StreamView
from kvist.ops.backend import Backend


class LayerView(Protocol):
    """One layer's cache during one step of `T` rows, padding rows included."""

    def write(self, k: Tensor | None, v: Tensor) -> None:
        """Store `k`, `v`: `[T, kv_heads, dim]`, one row per token of the step: of a layer's first stream and of its
        second, or None and its only one. Never called on a layer that reads another's."""
        ...

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        """Softmax attention of `q` `[T, heads, dim of keys]` over the tokens up to each row's own, `[T, heads, dim of
        values]`. `tie`: where streams are tied."""
        ...


@dataclass(frozen=True)
class PagedView:
    """A layer's view of the store, where codecs write in place: `keys` and `values` are its planes."""

    keys: Tensor
    values: Tensor
    step: Step
    group: int  # of its layer
    window: int
    softcap: float
    backend: Backend

    def write(self, k: Tensor | None, v: Tensor) -> None:
        self.backend.write(self.keys, self.values, k, v, self.step.slots[self.group])

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        where = self.step.tables[self.group], self.step.starts, self.step.lengths
        return self.backend.attend(q, self.keys, self.values, *where, scale, self.window, self.softcap)


@dataclass(frozen=True)
class OpenView:
    """A layer's view of the store, where blocks stay open until they are full.

    `keys`, `values`: its coded planes. `planes`: its open blocks; `open`: where this step's rows lie in them.
    """

    layout: LayerLayout
    keys: list[Tensor]
    values: list[Tensor]
    planes: OpenPlanes
    step: Step
    open: OpenStep
    group: int  # of its layer
    window: int
    block_size: int
    backend: Backend

    def write(self, k: Tensor | None, v: Tensor) -> None:
        open = self.open
        self.backend.write(self.planes.keys, self.planes.values, k, v, open.slots)
        if not len(open.sources):
            return
        keys, values = self.layout.streams
        for stream, plane, coded in ((keys, self.planes.keys, self.keys), (values, self.planes.values, self.values)):
            if stream.has_kernel:
                is_keys = stream.stream.role is Role.KEYS
                self.backend.seal(plane, coded, *stream.operands, is_keys, open.sources, open.targets[self.group])
            else:
                seal_decoded(plane, coded, stream, open.sources, open.targets[self.group])

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        step, open, planes = self.step, self.open, self.planes
        window, tables, softcap = self.window, step.tables[self.group], self.layout.spec.softcap
        own_blocks = open.tables, open.starts, open.lengths
        own = self.backend.attend_own(q, planes.keys, planes.values, *own_blocks, scale, window, softcap)
        first, second = self.layout.streams
        if first.has_kernel and second.has_kernel:
            coded = (self.keys, *first.operands, self.values, *second.operands)
            where = (tables, step.starts, step.lengths, self.block_size)
            return self.backend.attend_coded(q, *own, *coded, *where, scale, window, softcap)
        sequences = Sequences(tables, step.starts, step.lengths, self.block_size, window)
        return attend_decoded(q, *own, (first, self.keys), (second, self.values), sequences, scale, softcap)


# What `packed_layers` takes of a step and the cache, from `step` to `window`. See `kvist.ops.schema`.
Operands = tuple[
    list[Tensor],
    list[Tensor],
    list[Tensor],
    list[int],
    list[Tensor],
    list[Tensor],
    list[int],
    list[Tensor],
    int,
    int,
]


class PagedViews(Sequence[LayerView]):
    """One view per layer of the model, in order, for one step. They are made when they are asked for."""

    def __init__(self, store: Store, step: Step, backend: Backend) -> None:
        self._store = store
        self._step = step
        self._backend = backend

    def __len__(self) -> int:
        return len(self._store.layout.layers)

    def __getitem__(self, index: Any) -> Any:
        return self._views[index]

    @cached_property
    def operands(self) -> Operands | None:
        """All layers at once, for an operator that takes them so; None where they do not have the same codecs, or have
        one without a kernel."""
        store, step = self._store, self._step
        if store.operands is None:
            return None
        group = store.layout.group_of[0]  # of all layers
        tensors = [step.slots[group], step.tables[group], step.starts, step.lengths]
        opened = list[Tensor]()
        if step.open is not None:
            (planes,), open, size = store.open_planes, step.open, store.layout.block_size
            slots, tables = planes.for_layers(open.slots, size), planes.for_layers(open.tables, 1)
            sources = planes.for_layers(open.sources, 1)
            opened = [
                planes.keys,
                planes.values,
                slots,
                tables,
                open.starts,
                open.lengths,
                sources,
                open.targets[group],
            ]
        return (
            tensors,
            opened,
            *store.operands,
            store.layout.block_size,
            window_of(store.layout.layers[0].spec.retention),
        )

    @cached_property
    def _views(self) -> Sequence[LayerView]:
        store, step, backend = self._store, self._step, self._backend
        layout, views = store.layout, list[LayerView]()
        opened = {} if step.open is None else _by_layer(store, step.open)
        for index in range(len(layout.layers)):
            layer = layout.layers[store.owner(index)]
            planes, group, window = store.planes(index), layout.group_of[index], window_of(layer.spec.retention)
            if layer.spec.reading is not Reading.APART:
                where = opened.get(store.owner(index))
                views.append(StreamView(layer, planes, step, where, group, window, layout.block_size, backend))
                continue
            if not layer.opens:
                views.append(PagedView(planes[0], planes[1], step, group, window, layer.spec.softcap, backend))
                continue
            count = len(layer.streams[0].planes)
            keys, values = list(planes[:count]), list(planes[count:])
            open, own = opened[store.owner(index)]
            views.append(OpenView(layer, keys, values, open, step, own, group, window, layout.block_size, backend))
        return views


def _by_layer(store: Store, step: OpenStep) -> dict[int, tuple[OpenPlanes, OpenStep]]:
    """The open blocks of a step as they lie for each layer, worked out for all layers at once."""
    found, size = {}, store.layout.block_size
    for planes in store.open_planes:
        slots, tables = planes.for_layers(step.slots, size), planes.for_layers(step.tables, 1)
        sources = planes.for_layers(step.sources, 1)
        for index, layer in enumerate(planes.layers):
            found[layer] = (planes, replace(step, slots=slots[index], tables=tables[index], sources=sources[index]))
    return found
