"""Contexts: computed once, read afterwards, pinned, carried to another machine; and files that lie."""

import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.cache.record import record_bytes
from kvist.runtime.request import Request
from kvist.runtime.sequence import Sequence
from kvist.service.calibration import TEXT as WORDS
from kvist.service.context_check import Check
from kvist.service.context_file import export_context, import_context
from kvist.service.context_making import context_tokens, make_context, usable
from kvist.service.contexts import Context, Contexts, all_contexts, pin_all
from kvist.service.keeping import KeepSettings, Kept, open_kept
from kvist.service.loaded import Loaded, open_model
from tiny_model import write_tiny_model

TEXT = WORDS.read_text("utf-8")[:2500]
BUDGET = 1 << 28


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.set_num_threads(1)
    return open_model(str(write_tiny_model(tmp_path_factory.mktemp("contexts") / "tiny")))


@pytest.fixture(scope="module")
def pristine(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Context, Path]:
    """A folder with a context, the context, and its exported file."""
    folder = tmp_path_factory.mktemp("kept")
    with open_kept(loaded, KeepSettings(folder, BUDGET)) as kept:
        made = make_context(loaded, kept, "book", "text", TEXT, ["book.txt"])
        assert made is not None
        export_context(made, kept.disk, folder / "book.kvc")
    return folder, made, folder / "book.kvc"


@pytest.fixture
def opened(loaded: Loaded, tmp_path: Path) -> Iterator[Kept]:
    with open_kept(loaded, KeepSettings(tmp_path / "fresh", BUDGET)) as kept:
        yield kept


def ask(loaded: Loaded, kept: Kept | None, tokens: tuple[int, ...]) -> tuple[Sequence, list[Tensor], int]:
    """Continue these tokens; the sequence, the logits it drew from, and how many tokens were computed."""
    engine = (
        loaded.engine(loaded.room(len(tokens) + 8))
        if kept is None
        else loaded.engine(loaded.room(len(tokens) + 8, prefixes=True), kept)
    )
    run, logits = engine.runner.run, list[Tensor]()

    def noted(works):  # type: ignore[no-untyped-def]
        found = run(works)
        logits.extend(rows[-1].clone() for rows in found if len(rows))
        return found

    engine.runner.run = noted  # type: ignore[method-assign]
    sequence = engine.add(Request(tokens, 6, kept=False))
    while not engine.idle:
        engine.step()
    return sequence, logits, engine.counters.computed


def test_a_context_is_read_and_not_computed(loaded: Loaded, pristine: tuple[Path, Context, Path]) -> None:
    folder, made, _ = pristine
    tokens = (*made.tokens, *loaded.tokenizer().encode(" And then?", add_special=False))
    cold, expected, _ = ask(loaded, None, tokens)
    with open_kept(loaded, KeepSettings(folder)) as kept:
        found = usable(Contexts(folder).get("book"), kept)
        assert found == made
        warm, logits, computed = ask(loaded, kept, tokens)
        whole = len(made.tokens) // 64 * 64
        assert kept.cache.counters.hits["disk"] == whole // 64 > 5
        assert warm.cached.tiers["disk"] == whole
        assert computed == len(tokens) - whole + 5
    assert warm.new_tokens == cold.new_tokens
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_an_imported_context_gives_the_same_bits(
    loaded: Loaded, pristine: tuple[Path, Context, Path], opened: Kept
) -> None:
    _, made, file = pristine
    contexts = Contexts(opened.disk.folder)
    found = import_context(file, "copy", contexts, opened.disk, opened.identity, loaded, check=Check.ALL)
    assert contexts.names() == ["copy"]
    assert not found.elsewhere
    tokens = (*found.tokens, 5, 6, 7)
    cold, expected, _ = ask(loaded, None, tokens)
    warm, logits, _ = ask(loaded, opened, tokens)
    assert opened.cache.counters.hits["disk"] == len(made.tokens) // 64
    assert warm.new_tokens == cold.new_tokens
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))


def test_what_another_model_made_is_refused(
    loaded: Loaded, pristine: tuple[Path, Context, Path], opened: Kept, tmp_path: Path
) -> None:
    _, made, file = pristine
    contexts = Contexts(opened.disk.folder)

    def take(identity: object, **more: bool) -> Context:
        return import_context(file, None, contexts, opened.disk, identity, loaded, **more)  # type: ignore[arg-type]

    with pytest.raises(KvistError, match="weights, tokenizer differ"):
        take(replace(opened.identity, weights="0", tokenizer="1"))
    rounded = replace(opened.identity, arithmetic="other")
    with pytest.raises(KvistError, match=r"rounded otherwise \(arithmetic\).*--other-arithmetic"):
        take(rounded)
    assert contexts.names() == []
    assert len(opened.disk) == 0
    assert take(rounded, other_arithmetic=True).elsewhere
    with pytest.raises(KvistError, match="another weights"):
        usable(replace(made, identity=replace(made.identity, weights="0")), opened)


def test_contexts_are_pinned_until_they_are_removed(
    loaded: Loaded, pristine: tuple[Path, Context, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pristine[0], tmp_path / "copy"))
    made = pristine[1]
    size = record_bytes(64, loaded.layout.block_bytes)
    names = [block.name for block in made.blocks]
    with open_kept(loaded, KeepSettings(folder, made.nbytes + 3 * size)) as kept:
        for seed in range(8):
            rng = random.Random(seed)
            ask_and_keep(loaded, kept, tuple(rng.randrange(300) for _ in range(200)))
        assert all(map(kept.disk.contains, names))
        assert kept.disk.used <= kept.disk.budget
        assert kept.disk.evicted > 10
        with pytest.raises(KvistError, match=r"contexts hold .* already"):
            make_context(loaded, kept, "more", "text", TEXT[::-1], [])
        Contexts(folder).remove("book", kept.disk)
        assert Contexts(folder).names() == []
        for seed in range(20, 30):
            rng = random.Random(seed)
            ask_and_keep(loaded, kept, tuple(rng.randrange(300) for _ in range(200)))
        assert not any(map(kept.disk.contains, names))


def ask_and_keep(loaded: Loaded, kept: Kept, tokens: tuple[int, ...]) -> None:
    engine = loaded.engine(loaded.room(len(tokens) + 1, prefixes=True), kept)
    engine.add(Request(tokens, 1))
    while not engine.idle:
        engine.step()
    assert engine.keeper.flush(30)


def test_a_cancelled_context_leaves_nothing_under_its_name(loaded: Loaded, opened: Kept) -> None:
    calls = iter([False, True])
    assert make_context(loaded, opened, "half", "text", TEXT, [], cancelled=lambda: next(calls, True)) is None
    assert Contexts(opened.disk.folder).names() == []


def test_texts_that_cannot_be_contexts(loaded: Loaded, opened: Kept) -> None:
    with pytest.raises(KvistError, match="at least 64, one block"):
        make_context(loaded, opened, "short", "text", "A few words.", [])
    with pytest.raises(KvistError, match="the model's context holds 2,048"):
        make_context(loaded, opened, "long", "text", TEXT * 5, [])


def test_a_chat_begins_with_the_tokens_of_its_context(loaded: Loaded) -> None:
    from kvist.text.chat import ChatTemplate

    template = ChatTemplate.load(loaded.directory)
    assert template is not None
    tokens = context_tokens("chat", TEXT, template, loaded.tokenizer())
    messages = [{"role": "system", "content": f"{TEXT}\n\nBe brief."}, {"role": "user", "content": "Well?"}]
    prompt = loaded.tokenizer().encode(template.render(messages), add_special=False)
    assert prompt[: len(tokens)] == tokens
    assert len(tokens) > 400


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\0b", "-x", "x" * 65, "a b", "é", ".hidden"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    contexts = Contexts(tmp_path)
    for act in (contexts.get, contexts.remove, contexts.used):
        with pytest.raises(KvistError, match="a context's name has"):
            act(name)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0])
def test_exports_and_what_is_kept_are_their_owners_alone_whatever_the_umask(
    loaded: Loaded, pristine: tuple[Path, Context, Path], tmp_path: Path, mask: int
) -> None:
    kept, exported = tmp_path / "kept", tmp_path / "exports" / "book.kvc"
    before = os.umask(mask)
    try:
        with open_kept(loaded, KeepSettings(kept, BUDGET)) as opened:
            import_context(pristine[2], None, Contexts(kept), opened.disk, opened.identity, loaded)
            export_context(Contexts(kept).get("book"), opened.disk, exported)
    finally:
        os.umask(before)
    assert list(kept.rglob("*.kv"))
    assert list(kept.rglob("book.json"))
    for path in (kept, *kept.rglob("*"), exported.parent, exported):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_links_and_damage_are_not_followed(pristine: tuple[Path, Context, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine[0], tmp_path / "copy"))
    contexts = Contexts(folder)
    described = next((folder / "contexts").rglob("book.json"))
    (described.parent / "link.json").symlink_to(described)
    (described.parent / "bad.json").write_text('{"name": "bad"}')
    assert contexts.names() == ["bad", "book"]
    with pytest.raises(KvistError, match="there is no context 'link'"):
        contexts.get("link")
    with pytest.raises(KvistError, match=r"damaged .*; remove the context"):
        contexts.get("bad")
    assert [context.name for context in all_contexts(folder)] == ["book"]
    assert described.stat().st_mode & 0o077 == 0
    assert Contexts(folder, "@somebody").names() == []
    (described.parent / "other.json").write_text(described.read_text())
    with pytest.raises(KvistError, match="describes another context"):
        contexts.get("other")


def test_descriptions_that_lie_are_refused(pristine: tuple[Path, Context, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine[0], tmp_path / "copy"))
    described = next((folder / "contexts").rglob("book.json"))
    good = json.loads(described.read_text())
    rng = random.Random(4)
    values = [None, -1, 0, 2**70, "x", [], {}, [-1], ["a"], True, 1.5, "\0", [2**33], {"weights": 3}]
    for _ in range(300):
        bad = dict(good)
        field = rng.choice(list(bad))
        if rng.random() < 0.2:
            del bad[field]
        else:
            bad[field] = rng.choice([value for value in values if type(value) is not type(bad[field])])
        described.write_text(json.dumps(bad))
        with pytest.raises(KvistError):
            Contexts(folder).get("book")
        assert list(all_contexts(folder)) == []


def test_exported_files_that_lie_are_refused(
    loaded: Loaded, pristine: tuple[Path, Context, Path], opened: Kept, tmp_path: Path
) -> None:
    """Hundreds of them; and nothing of any is found afterwards."""
    data, rng = pristine[2].read_bytes(), random.Random(9)
    length = struct.unpack_from("<I", data, 12)[0]
    start = 16 + length
    contexts = Contexts(opened.disk.folder)
    for trial in range(400):
        bad = bytearray(data)
        kind = trial % 6
        if kind == 0:
            del bad[rng.randrange(len(bad)) :]
        elif kind == 1:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        elif kind == 2:  # the head: magic, version, length
            bad[rng.randrange(16)] = rng.randrange(256)
            if bad == data:
                continue
        elif kind == 3:  # a length that lies
            struct.pack_into("<I", bad, 12, rng.choice([0, 1, length - 1, length + 1, 2**31, 2**32 - 1]))
        elif kind == 4:  # a record's head
            place = start + rng.randrange(400)
            bad[place : place + 8] = rng.randbytes(8)
        else:
            bad += rng.randbytes(rng.randrange(1, 100))
        file = tmp_path / "bad.kvc"
        file.write_bytes(bad)
        with pytest.raises(KvistError) as refused:
            import_context(file, None, contexts, opened.disk, opened.identity, loaded)
        assert "\n" not in str(refused.value)
    assert contexts.names() == []
    file.write_bytes(data)  # and the good one is taken
    import_context(file, None, contexts, opened.disk, opened.identity, loaded)
    assert contexts.names() == ["book"]


def test_all_contexts_are_pinned_when_a_folder_is_opened(
    loaded: Loaded, pristine: tuple[Path, Context, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pristine[0], tmp_path / "copy"))
    with open_kept(loaded, KeepSettings(folder)) as kept:
        pin_all(kept.disk)
        for block in pristine[1].blocks:
            assert kept.disk._entries[block.name].until == float("inf")
