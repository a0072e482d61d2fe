"""Layouts to the byte: known models, windows and sources counted token by token, fingerprints, refusals."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvist.base.errors import ConfigError
from kvist.cache.calibration import Calibration, StreamStatistics
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.spec import Full, LayerSpec, Role, Stream, Window, key_value

KEYS = Stream("k", Role.KEYS, 2, 16)
VALUES = Stream("v", Role.VALUES, 2, 16)


# Layers, KV heads, head size; bytes per token in bf16, from the models' cards: layers * 2 * heads * size * 2 bytes.
@pytest.mark.parametrize(
    ("layers", "heads", "dim", "bytes_per_token"),
    [
        pytest.param(30, 3, 64, 23_040, id="smollm2-135m"),
        pytest.param(24, 2, 64, 12_288, id="qwen2.5-0.5b"),
        pytest.param(16, 8, 64, 32_768, id="llama-3.2-1b"),
        pytest.param(32, 8, 128, 131_072, id="llama-3.1-8b"),
    ],
)
def test_bytes_per_token_of_known_models(layers: int, heads: int, dim: int, bytes_per_token: int) -> None:
    specs = [key_value(heads, dim)] * layers
    assert plan_layout(specs, codec("bf16")).bytes_per_token == bytes_per_token
    assert plan_layout(specs, codec("fp16"), 16).bytes_per_token == bytes_per_token
    assert plan_layout(specs, codec("fp32"), 512).bytes_per_token == 2 * bytes_per_token


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("block_size", [16, 64, 512])
@pytest.mark.parametrize("dim", [8, 48, 80, 128, 256])
def test_planes_hold_each_number_once(name: str, block_size: int, dim: int) -> None:
    layout = plan_layout([key_value(3, dim)], codec(name), block_size)
    keys, values = layout.layers[0].planes
    for plane in (keys, values):
        assert torch.Size(plane.shape).numel() == 3 * dim * block_size
        assert plane.nbytes == torch.empty(plane.shape, dtype=plane.dtype).nbytes
    assert (keys.name, values.name) == ("k", "v")
    assert layout.block_bytes == keys.nbytes + values.nbytes


@pytest.mark.parametrize(("kv", "bits"), [("turbo4", 4.25), ("k=int8,v=turbo4", 6.25), ("turbo4,0:bf16", 10.125)])
def test_bits_and_bytes_of_a_coded_layout(kv: str, bits: float) -> None:
    layout = plan_layout([key_value(3, 64)] * 2, parse_choice(kv), full=codec("bf16"))
    assert layout.bits_per_value == bits
    assert layout.bytes_per_token == 2 * 2 * 3 * 64 * bits / 8
    # Only layers with a lossy codec have open blocks, and a sequence may hold two of them.
    lossy = sum(layer.opens for layer in layout.layers)
    assert layout.open_bytes == lossy * 2 * 3 * 64 * 64 * 2
    assert layout.bytes_for(100) == 2 * layout.block_bytes + 2 * layout.open_bytes


def blocks_by_token(retention: Full | Window, tokens: int, block_size: int) -> int:
    """Each kept token looked at one by one."""
    if isinstance(retention, Full):
        kept = set(range(tokens))
    else:
        kept = set(range(min(retention.sinks, tokens))) | set(range(max(0, tokens - retention.size), tokens))
    return len({token // block_size for token in kept})


@given(
    tokens=st.integers(0, 400),
    size=st.integers(1, 200),
    sinks=st.integers(0, 100),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_bytes_of_a_window_are_those_of_the_blocks_that_hold_its_tokens(
    tokens: int, size: int, sinks: int, block_size: int
) -> None:
    window = Window(size, sinks)
    layout = plan_layout([key_value(1, 8), key_value(2, 8, window), key_value(2, 8, window)], codec("fp32"), block_size)
    assert [group.layers for group in layout.groups] == [(0,), (1, 2)]
    token_bytes = 2 * 8 * 4
    expected = (
        block_size
        * token_bytes
        * (blocks_by_token(Full(), tokens, block_size) + 4 * blocks_by_token(window, tokens, block_size))
    )
    assert layout.bytes_for(tokens) == expected


def test_a_window_costs_no_more_however_long_the_text() -> None:
    layout = plan_layout([key_value(1, 8, Window(128, 4))], codec("fp32"), 64)
    assert max(layout.bytes_for(tokens) for tokens in range(1_000, 2_000)) == 4 * layout.block_bytes
    full = plan_layout([key_value(1, 8)], codec("fp32"), 64)
    assert full.bytes_for(2_000) == 32 * full.block_bytes


def test_a_layer_that_reads_a_source_owns_no_bytes() -> None:
    owner = key_value(2, 16)
    reader = LayerSpec((), source=0)
    alone, shared = plan_layout([owner], codec("bf16")), plan_layout([owner, reader, reader], codec("bf16"))
    assert shared.layers[1].planes == ()
    assert shared.block_bytes == alone.block_bytes
    assert shared.bytes_for(100) == alone.bytes_for(100)


RENAMED = replace(codec("bf16"), name="bf16-renamed")
OWNER = LayerSpec((KEYS, VALUES))
READER = LayerSpec((), source=0)
SPECS = (OWNER, OWNER, READER)
CODED = (key_value(2, 64), key_value(2, 64))


def calibration(mean: float = 0.0, outlier: int = 0) -> Calibration:
    energy = torch.ones(2, 64)
    energy[:, outlier] = 9.0
    statistics = StreamStatistics(torch.full((2, 64), mean), energy)
    return Calibration("some model", 100, ({"k": statistics, "v": statistics},) * 2)


def changed(stream: Stream) -> tuple[LayerSpec, ...]:
    """The specs with the first layer's keys replaced."""
    return (LayerSpec((stream, VALUES)), OWNER, READER)


def test_a_fingerprint_changes_with_every_ingredient() -> None:
    bf16 = codec("bf16")
    layouts = {
        "as it is": plan_layout(SPECS, bf16),
        "block size": plan_layout(SPECS, bf16, 32),
        "codec": plan_layout(SPECS, codec("fp16")),
        "codec's name": plan_layout(SPECS, RENAMED),
        "one layer less": plan_layout((OWNER, READER), bf16),
        "no source": plan_layout((OWNER, OWNER, OWNER), bf16),
        "another source": plan_layout((OWNER, OWNER, LayerSpec((), source=1)), bf16),
        "stream's name": plan_layout(changed(replace(KEYS, name="latent")), bf16),
        "stream's role": plan_layout(changed(replace(KEYS, role=Role.VALUES)), bf16),
        "heads": plan_layout(changed(replace(KEYS, heads=4)), bf16),
        "dim": plan_layout(changed(replace(KEYS, dim=32)), bf16),
        "as many numbers otherwise": plan_layout(changed(replace(KEYS, heads=1, dim=32)), bf16),
        "order of streams": plan_layout((LayerSpec((VALUES, KEYS)), OWNER, READER), bf16),
        "window": plan_layout((OWNER, LayerSpec((KEYS, VALUES), Window(64)), READER), bf16),
        "longer window": plan_layout((OWNER, LayerSpec((KEYS, VALUES), Window(65)), READER), bf16),
        "sinks": plan_layout((OWNER, LayerSpec((KEYS, VALUES), Window(64, 1)), READER), bf16),
        "coded": plan_layout(CODED, codec("turbo4")),
        "other levels": plan_layout(CODED, codec("int4-rot")),
        "one stream": plan_layout(CODED, parse_choice("turbo4,k=int8")),
        "the other stream": plan_layout(CODED, parse_choice("turbo4,v=int8")),
        "one layer": plan_layout(CODED, parse_choice("turbo4,1:bf16")),
        "open blocks": plan_layout(CODED, codec("turbo4"), full=codec("bf16")),
        "mean": plan_layout(CODED, codec("turbo4"), calibration=calibration(mean=1.0)),
        "another mean": plan_layout(CODED, codec("turbo4"), calibration=calibration(mean=2.0)),
        "outliers": plan_layout(CODED, codec("turbo2.5"), calibration=calibration()),
        "other outliers": plan_layout(CODED, codec("turbo2.5"), calibration=calibration(outlier=63)),
    }
    fingerprints = {name: layout.fingerprint for name, layout in layouts.items()}
    assert len(set(fingerprints.values())) == len(layouts), fingerprints
    assert plan_layout(list(SPECS), bf16).fingerprint == fingerprints["as it is"]
    # What no codec uses is no part of it.
    assert plan_layout(SPECS, bf16, full=bf16).fingerprint == fingerprints["as it is"]
    uncentred = plan_layout(CODED, codec("int4"), calibration=calibration(mean=1.0))
    assert uncentred.fingerprint == plan_layout(CODED, codec("int4")).fingerprint


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from kvist.cache.codecs import codec\n"
        "from kvist.cache.layout import plan_layout\n"
        "from kvist.cache.spec import Window, key_value\n"
        "print(plan_layout([key_value(2, 16), key_value(2, 16, Window(64, 4))], codec('bf16')).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here = plan_layout([key_value(2, 16), key_value(2, 16, Window(64, 4))], codec("bf16")).fingerprint
    assert there.stdout.strip() == here


@pytest.mark.parametrize(
    ("attempt", "finding"),
    [
        (lambda: Stream("k", Role.KEYS, 0, 8), "at least one head"),
        (lambda: Stream("k", Role.KEYS, 1, 0), "at least one head and one dimension"),
        (lambda: Window(0), "at least one token"),
        (lambda: Window(4, -1), "no negative number of sinks"),
        (lambda: LayerSpec((KEYS, KEYS)), "different names, got k, k"),
        (lambda: LayerSpec(()), "never both or neither"),
        (lambda: LayerSpec((KEYS, VALUES), source=0), "never both or neither"),
        (lambda: plan_layout([READER], codec("bf16")), "reads the cache of layer 0, which is not before it"),
        (lambda: plan_layout([OWNER, LayerSpec((), source=-1)], codec("bf16")), "layer -1, which is not before it"),
        (lambda: plan_layout([OWNER, READER, LayerSpec((), source=1)], codec("bf16")), "owns no cache itself"),
        (lambda: plan_layout([OWNER, LayerSpec((), Window(8), 0)], codec("bf16")), "keep different tokens"),
        (lambda: plan_layout([], codec("bf16")), "at least one layer"),
        (lambda: plan_layout([OWNER], codec("bf16"), 48), "128, 256 or 512 tokens, not 48"),
        (lambda: plan_layout([OWNER], codec("bf16"), 8), "not 8"),
        (lambda: plan_layout([OWNER], codec("bf16"), 0), "not 0"),
        (lambda: plan_layout([OWNER], codec("bf16"), 1024), "not 1024"),
        (lambda: plan_layout([key_value(1, 12)], codec("bf16")), "'k'.*multiple of 8 up to 512, got 12"),
        (lambda: plan_layout([key_value(1, 520)], codec("fp32")), "'k'.*multiple of 8 up to 512, got 520"),
        (lambda: codec("fp8"), "no KV codec 'fp8'; choose one of fp32, bf16, fp16"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(attempt: Callable[[], object], finding: str) -> None:
    with pytest.raises(ConfigError, match=finding):
        attempt()
