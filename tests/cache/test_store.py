"""The planes themselves: as many bytes as the layout says, exact copies, memory taken only where it is written."""

import psutil
import pytest
import torch

from kvist.cache.choice import parse_choice
from kvist.cache.codecs import CODECS, codec
from kvist.cache.layout import plan_layout
from kvist.cache.manager import Copy
from kvist.cache.spec import LayerSpec, key_value
from kvist.cache.store import Store

SPECS = [key_value(2, 32), key_value(3, 48), LayerSpec((), source=0)]
IN_PLACE = [name for name, codec in CODECS.items() if codec.in_place]


def filled(name: str, blocks: int) -> Store:
    """A store whose every byte is random."""
    store = Store(plan_layout(SPECS, codec(name), 16), blocks)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        for plane in store.planes(layer):
            raw = plane.view(torch.uint8)
            raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=generator))
    return store


@pytest.mark.parametrize("name", list(CODECS))
def test_a_store_takes_what_its_layout_says_and_starts_empty(name: str) -> None:
    layout = plan_layout(SPECS, codec(name), 16)
    store = Store(layout, 5)
    assert store.nbytes == 5 * layout.block_bytes
    assert Store(layout, 5, kept=3).nbytes == 5 * layout.block_bytes + 3 * layout.open_bytes
    for layer in (0, 1):
        for plane, described in zip(store.planes(layer), layout.layers[layer].planes, strict=True):
            assert (tuple(plane.shape), plane.dtype) == ((5, *described.shape), described.dtype)
            assert plane.is_contiguous()
            assert not plane.any()


def test_a_layer_with_a_source_reads_its_planes() -> None:
    store = filled("fp32", 4)
    assert [plane.data_ptr() for plane in store.planes(2)] == [plane.data_ptr() for plane in store.planes(0)]
    assert store.planes(1)[0].data_ptr() != store.planes(0)[0].data_ptr()


@pytest.mark.parametrize("blocks", [1, 3, 4_000])
def test_planes_begin_on_a_cache_line(blocks: int) -> None:
    store = Store(plan_layout(SPECS, codec("bf16"), 64), blocks)
    assert {plane.data_ptr() % 64 for layer in (0, 1) for plane in store.planes(layer)} == {0}


@pytest.mark.parametrize("name", IN_PLACE)
def test_copies_are_exact_and_touch_nothing_else(name: str) -> None:
    """Random bytes: among them NaN and infinities, which a copy through arithmetic would not keep."""
    store = filled(name, 6)
    before = [[plane.view(torch.uint8).clone() for plane in store.planes(layer)] for layer in (0, 1)]
    store.copy([Copy(0, 3), Copy(1, 5)])
    for layer in (0, 1):
        for plane, old in zip(store.planes(layer), before[layer], strict=True):
            now = plane.view(torch.uint8)
            for block, source in enumerate((0, 1, 2, 0, 4, 1)):
                assert torch.equal(now[block], old[source])


def test_copies_of_open_blocks_are_exact_and_touch_nothing_else() -> None:
    """Layers of one shape share a plane: each has its own kept blocks behind the passing ones, which all use."""
    layout = plan_layout([key_value(2, 32), key_value(1, 64), key_value(2, 32)], parse_choice("turbo4,1:v=bf16"), 16)
    store = Store(layout, 4, kept=5, passing=2)
    assert [open.layers for open in store.open_planes] == [(0, 2), (1,)]
    generator = torch.Generator().manual_seed(0)
    planes = [plane for open in store.open_planes for plane in (open.keys, open.values)]
    for plane in planes:
        plane.copy_(torch.randn(plane.shape, generator=generator))
    before, coded = [plane.clone() for plane in planes], [plane.clone() for plane in store.planes(1)]
    store.copy([Copy(0, 3, open=True), Copy(1, 2)])
    for plane, old in zip(planes, before, strict=True):
        layers = (len(plane) - 2) // 5
        moved = {2 + layer * 5 + 3: 2 + layer * 5 for layer in range(layers)}
        for block in range(len(plane)):
            assert torch.equal(plane[block], old[moved.get(block, block)])
    # A block that is coded is never written while it is shared, so its bytes are not worth copying.
    assert all(torch.equal(plane, old) for plane, old in zip(store.planes(1), coded, strict=True))


def test_ids_lie_behind_those_of_earlier_layers() -> None:
    store = Store(plan_layout([key_value(2, 32)] * 3, codec("int8"), 16), 4, kept=5, passing=2)
    (open,) = store.open_planes
    assert open.for_layers(torch.tensor([0, 1, 2, 6]), 1).tolist() == [[0, 1, 2, 6], [0, 1, 7, 11], [0, 1, 12, 16]]
    slots = open.for_layers(torch.tensor([-1, 31, 32, 47]), 16)
    assert slots.tolist() == [[-1, 31, 32, 47], [-1, 31, 112, 127], [-1, 31, 192, 207]]


def test_no_copies_change_nothing() -> None:
    store = filled("fp32", 3)
    before = store.planes(0)[0].view(torch.uint8).clone()
    store.copy([])
    assert torch.equal(store.planes(0)[0].view(torch.uint8), before)


def test_a_large_store_takes_memory_only_where_it_is_written() -> None:
    """The layout of 8 layers of 8 heads of 128 in float32: 4 MiB a block."""
    layout = plan_layout([key_value(8, 128)] * 8, codec("fp32"), 64)
    blocks = 2**30 // layout.block_bytes
    process = psutil.Process()
    before = process.memory_info().rss
    store = Store(layout, blocks)
    allocated = process.memory_info().rss - before
    assert store.nbytes == 2**30
    assert allocated < 2**30 // 16
    for layer in range(8):
        for plane in store.planes(layer):
            plane[: blocks // 4].fill_(1.0)
    written = process.memory_info().rss - before
    assert written > 2**30 // 4 - 2**26
    assert written < 2**30 // 2
