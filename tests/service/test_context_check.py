"""Imported contexts whose KV is not what their tokens give: what a check finds, and what never comes of it."""

import contextlib
import hashlib
import random
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.cache.codecs import FP32
from kvist.cache.layout import plan_layout
from kvist.cache.record import header, record_bytes
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.runtime.request import Request
from kvist.service import calibration as calibration_module
from kvist.service.context_check import LEAST, SHARE, Check, drawn
from kvist.service.context_file import export_context, import_context
from kvist.service.contexts import TEXT, Context, Contexts, describe, finish, read_context
from kvist.service.keeping import KeepSettings, Kept, open_kept
from kvist.service.loaded import Loaded, select_backend

BUDGET = 1 << 28
BLOCKS = 12  # more than the least of a sample
SMALL = ModelConfig(
    family="qwen2",
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    max_positions=2048,
    norm_eps=1e-6,
    activation=Activation.SILU,
    rope=Rope(1e6),
    qkv_bias=True,
)
KINDS = {"fp32": SMALL, "bf16": SMALL, "turbo4": SMALL, "windows": replace(SMALL, windows=(0, 100, 40))}


@pytest.fixture(params=list(KINDS))
def loaded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    torch.set_num_threads(1)
    monkeypatch.setattr(calibration_module, "writable_cache_folder", lambda: tmp_path / "cache")
    config, dtype = KINDS[request.param], torch.bfloat16 if request.param == "bf16" else torch.float32
    backend = select_backend(config, dtype)
    model = randomize(build(config, backend, dtype), seed=3, std=0.1)
    loaded = Loaded("random", config, model, plan_layout(config.layer_specs(), FP32), backend, Path("none"))
    return loaded.with_kv("fp32" if request.param == "windows" else request.param)


def tokens_of(count: int, seed: int = 7) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(61) for _ in range(count))


@contextlib.contextmanager
def exported(loaded: Loaded, folder: Path, blocks: int = BLOCKS) -> Iterator[tuple[Path, Context]]:
    """A context's file, honestly made."""
    with open_kept(loaded, KeepSettings(folder, BUDGET)) as kept:
        tokens, layout = tokens_of(blocks * 64 + 5), loaded.layout
        engine = loaded.engine(loaded.room(len(tokens) + 1, prefixes=True), kept)
        engine.add(Request(tokens, 1))
        while not engine.idle:
            engine.step()
        assert engine.keeper.flush(30)
        made = describe("book", "", TEXT, "", tokens, (), kept.identity, layout.block_size, layout.block_bytes)
        finish(made, Contexts(folder), kept.disk)
        file = folder / "book.kvc"
        export_context(made, kept.disk, file)
        yield file, made


def forged(file: Path, made: Context, blocks: set[int]) -> Path:
    """The same file with other planes in these blocks, and every digest as it must be."""
    data, size = bytearray(file.read_bytes()), record_bytes(made.block_size, made.block_bytes)
    start = len(data) - 32 - size * len(made.blocks)
    for number, block in enumerate(made.blocks):
        if number in blocks:
            place = start + number * size
            payload = bytearray(data[place + size - made.block_bytes : place + size])
            payload[-1] ^= 0x80  # one bit: the sign of one number, of the last layer's values
            data[place : place + size] = header(block, payload) + payload
    data[-32:] = hashlib.sha256(data[:-32]).digest()
    other = file.with_name(f"forged-{len(blocks)}.kvc")
    other.write_bytes(data)
    return other


def logits_of(loaded: Loaded, kept: Kept | None, request: Request) -> tuple[Tensor, int]:
    """What its first token is drawn from, and how many tokens came from the disk."""
    engine = (
        loaded.engine(loaded.room(len(request.prompt) + 8))
        if kept is None
        else loaded.engine(loaded.room(len(request.prompt) + 8, prefixes=True), kept)
    )
    run, logits = engine.runner.run, list[Tensor]()

    def noted(works):  # type: ignore[no-untyped-def]
        found = run(works)
        logits.extend(rows[-1].clone() for rows in found if len(rows))
        return found

    engine.runner.run = noted  # type: ignore[method-assign]
    sequence = engine.add(request)
    while not engine.idle:
        engine.step()
    return logits[0], sequence.cached.tiers.get("disk", 0)


def test_what_is_imported_serves_nobody_but_who_names_it_unless_all_is_known(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with exported(loaded, tmp_path / "there") as (file, made):
        bad = forged(file, made, {BLOCKS - 1})
    asked = Request((*made.tokens, 3, 4), 1, kept=False)
    expected, _ = logits_of(loaded, None, asked)
    monkeypatch.setattr(secrets.SystemRandom, "sample", lambda self, numbers, count: list(numbers)[:count])
    with open_kept(loaded, KeepSettings(tmp_path / "here", BUDGET)) as kept:
        contexts = Contexts(kept.disk.folder)

        def take(path: Path, check: Check) -> Context:
            return import_context(path, None, contexts, kept.disk, kept.identity, loaded, check=check)

        # A forged block that the sample missed: whoever names it is deceived, and nobody else.
        found = take(bad, Check.SAMPLE)
        assert (found.checked, bool(found.imported)) == (LEAST, True)
        plain, read = logits_of(loaded, kept, asked)
        assert read == 0
        assert torch.equal(plain, expected)
        named, read = logits_of(loaded, kept, replace(asked, imported=found.imported))
        assert read == BLOCKS * 64
        assert not torch.equal(named, expected)
        assert read_context(found.to_bytes()) == contexts.get("book") == found
        # What the disk has is not taken for another file's of the same tokens, be that looked at or not.
        honest = take(file, Check.SAMPLE)
        assert honest.imported not in ("", found.imported)
        named, read = logits_of(loaded, kept, replace(asked, imported=honest.imported))
        assert (read, torch.equal(named, expected)) == (BLOCKS * 64, True)
        # All of it computed again: now it is everybody's.
        shared = take(file, Check.ALL)
        assert (shared.checked, shared.imported) == (BLOCKS, "")
        plain, read = logits_of(loaded, kept, asked)
        assert (read, torch.equal(plain, expected)) == (BLOCKS * 64, True)
        with pytest.raises(KvistError, match=f"block {BLOCKS}: its keys and values are not those"):
            take(bad, Check.ALL)
        plain, read = logits_of(loaded, kept, asked)
        assert (read, torch.equal(plain, expected)) == (BLOCKS * 64, True)


def test_every_forged_block_is_found_where_all_are_computed(loaded: Loaded, tmp_path: Path) -> None:
    blocks = 4  # fewer than a sample has at least
    with exported(loaded, tmp_path / "there", blocks) as (file, made):
        each = [(number, forged(file, made, {number}).rename(tmp_path / f"{number}.kvc")) for number in range(blocks)]
        each.append((0, forged(file, made, set(range(blocks)))))
    with open_kept(loaded, KeepSettings(tmp_path / "here", BUDGET)) as kept:
        contexts = Contexts(kept.disk.folder)
        for number, path in each:
            with pytest.raises(KvistError, match=f"block {number + 1}: its keys and values are not those"):
                import_context(path, None, contexts, kept.disk, kept.identity, loaded)
        assert contexts.names() == []
        assert len(kept.disk) == 0
        # The operator's word is enough, for better or worse; without it, so few blocks are all looked at.
        trusted = import_context(each[0][1], None, contexts, kept.disk, kept.identity, loaded, check=Check.TRUST)
        assert (trusted.checked, trusted.imported) == (0, "")
        honest = import_context(file, None, contexts, kept.disk, kept.identity, loaded)
        assert (honest.checked, honest.imported) == (blocks, "")
        # Where sums are rounded otherwise nothing can be told, and nobody's word makes bits the same.
        other = replace(kept.identity, arithmetic="0" * 64)
        for check in Check:
            found = import_context(file, None, contexts, kept.disk, other, loaded, check=check, other_arithmetic=True)
            assert (found.elsewhere, found.checked, len(found.imported)) == (True, 0, 64)


def test_a_sample_is_another_each_time() -> None:
    assert drawn(LEAST, Check.SAMPLE) == set(range(LEAST))
    assert drawn(500, Check.ALL) == set(range(500))
    assert drawn(500, Check.TRUST) == set()
    samples = [frozenset(drawn(500, Check.SAMPLE)) for _ in range(40)]
    assert {len(sample) for sample in samples} == {-(-500 // SHARE)}
    assert len(set(samples)) == 40
    assert len(frozenset().union(*samples)) > 400
