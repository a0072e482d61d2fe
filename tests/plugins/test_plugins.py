"""Plug-ins are chosen as what is built in is, and what is kept of them belongs to their version."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
from packages import FAMILY, INT3, TWIG, Halves, Held, Install, forget
from torch import Tensor

import kvist
from kvist.base.errors import ConfigError, UnknownFamily
from kvist.cache.codecs import CODECS, Codec, codec
from kvist.cache.codecs.coded import CodedCodec
from kvist.cache.layout import plan_layout
from kvist.cache.spec import Stream, key_value
from kvist.cache.tiers import open_tier
from kvist.evals.calibrate import calibrate
from kvist.evals.codecs import run as eval_codecs
from kvist.models import llama
from kvist.models.families import FAMILIES, Family, load_config
from kvist.ops.coding import Frame
from kvist.service.calibration import calibration_path
from kvist.service.digest import model_digest
from kvist.service.identity import identify
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import open_model
from kvist.service.packing import packed_path
from kvist.testing import check_codec, check_family

TEXT = "O gentle night, be kind to those who wait. " * 8


def int3() -> Codec:
    scope: dict[str, Codec] = {}
    exec("\n".join(line[4:] for line in INT3.splitlines()), scope)
    return scope["INT3"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for calibrations, without the compiled operators' folder being another."""
    folder = tmp_path / "cache"
    for module in ("calibration", "digest", "fitness", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.writable_cache_folder", lambda: folder)
    return folder


def answer(kv: str, folder: Path) -> tuple[list[int], int]:
    """The tokens, and how many of the prompt came from the disk."""
    with kvist.LLM(kv=kv, memory="16MiB", threads=1, cache_disk="1GB", cache_dir=str(folder)) as llm:
        found = llm.generate(TEXT, max_tokens=4)
        return list(found.tokens), found.usage.cached.get("disk", 0)


def test_what_a_version_kept_is_found_by_that_version_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fresh = tmp_path / "kv", tmp_path / "fresh"
    kvist.register_codec(int3(), version="1")
    first, cached = answer("int3", folder)
    assert cached == 0
    assert answer("int3", folder) == (first, 320)
    forget(monkeypatch)
    kvist.register_codec(int3(), version="2")  # the same bytes, in truth: the version alone decides
    assert answer("int3", folder) == (first, 0)
    assert answer("int3", folder) == (first, 320)
    forget(monkeypatch)
    kvist.register_codec(int3(), version="1")
    assert answer("int3", folder) == (first, 320)
    # And of another codec of that name and version, which is a mistake, the measured arithmetic is another one.
    forget(monkeypatch)
    kvist.register_codec(CodedCodec("int3", codec("turbo3").code), version="1")
    found = answer("int3", folder)
    assert found == answer("int3", fresh)
    assert found[1] == 0


def test_a_version_is_part_of_a_layouts_fingerprint(monkeypatch: pytest.MonkeyPatch, install: Install) -> None:
    def fingerprint() -> str:
        return plan_layout([key_value(2, 64)], codec("int3")).fingerprint

    found = set()
    for version in ("1", "2"):
        kvist.register_codec(int3(), version=version)
        found.add(fingerprint())
        assert fingerprint() in found
        forget(monkeypatch)
    for package in ("twig", "branch"):  # who made it counts, too
        install(package, "1", codecs={"int3": f"plugged_{package}:INT3"}, modules={f"plugged_{package}": INT3})
        if package == "twig":
            found.add(fingerprint())
            monkeypatch.undo()
            forget(monkeypatch)
    assert len(found) == 3


def test_one_without_a_kernel_runs_and_is_exact() -> None:
    kvist.register_codec(Halves(), version="1")
    check_codec(codec("halves"), error=0.1)
    with kvist.LLM(kv="halves", memory="16MiB", threads=1) as llm:
        again = [llm.generate(TEXT, max_tokens=8).tokens for _ in range(2)]
        assert again[0] == again[1]
        assert llm.cache.usage().by_codec["halves"] > 0


def test_codecs_of_others_are_measured_and_proposed_beside_ours(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    kvist.register_codec(int3(), version="1")
    assert [one.codec for one in eval_codecs([64], ["int3", "turbo3"], 64, lambda what: None).distortions] == [
        "int3",
        "turbo3",
    ]
    loaded = open_model(None)
    tokens = loaded.tokenizer().encode(TEXT)[:130]
    _, report = calibrate(loaded, tokens, "text", 0.5)
    tried = {one.codec for layer in report.layers for stream in layer.streams.values() for one in stream.tried}
    assert "int3" in tried


def test_a_proposal_belongs_to_the_versions_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvist.cache.calibration import save_calibration
    from kvist.service.calibration import measure

    def planned(kv: str) -> str:
        return open_model(None, kv=kv).layout.kv

    kvist.register_codec(int3(), version="1")
    loaded = open_model(None)
    digest = model_digest(loaded.model, loaded.weights_digest())
    made = dataclasses.replace(
        measure(loaded.model, loaded.tokenizer().encode(TEXT), digest),
        proposal="turbo4,0:int3",
        plugins={"int3": "this program 1"},
    )
    save_calibration(calibration_path(digest), made)
    assert planned("auto") == "turbo4,0:int3"
    forget(monkeypatch)
    assert planned("turbo4") == "turbo4"  # whoever does not ask for it is not held up by it
    with pytest.raises(ConfigError, match="there is no KV codec 'int3'"):
        planned("auto")
    kvist.register_codec(int3(), version="2")
    with pytest.raises(ConfigError, match=r"int3 of this program 1; here is int3 of this program 2: run kvist calib"):
        planned("auto")


class Wrong(Halves):
    """What is overridden in each is wrong."""


class NoBlock(Wrong):
    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        raise RuntimeError("no memory\nleft")


class OtherPlanes(Wrong):
    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return (super().encode(x, stream, frame)[0].short(),)


class Scattered(Wrong):
    def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
        return (super().encode(x, stream, frame)[0].transpose(1, 2).contiguous().transpose(1, 2),)


class Doubles(Wrong):
    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return super().decode(planes, stream, frame).double()


class NoNumbers(Wrong):
    def decode(self, planes: tuple[Tensor, ...], stream: Stream, frame: Frame) -> Tensor:
        return super().decode(planes, stream, frame) / 0


class OfAnotherCoding(Wrong):
    def coding(self, stream: Stream) -> object:
        return codec("int4").coding(stream)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (NoBlock(), "fails: RuntimeError: no memory left"),
        (OtherPlanes(), r"encode gives planes of .*int16.* where planes says .*int8"),
        (Scattered(), "encode gives a plane that is not contiguous"),
        (Doubles(), r"decode gives torch\.float64 of \(64, 2, 64\) where float32 of \(64, 2, 64\) was coded"),
        (NoNumbers(), "decode gives numbers that are not finite"),
        (OfAnotherCoding(), "its planes are not those of its coding; a CodedCodec has them"),
        (Halves(in_place=True), "in_place is what a DenseCodec is"),
        (Halves(name="auto"), "'auto' stands for something else"),
        (Halves(name="a,b"), "a name has letters, digits"),
        (Halves(name=""), "a name has letters, digits"),
        (object(), "its in_place is neither True nor False"),
    ],
)
def test_what_is_no_codec_is_refused_when_it_is_registered(made: Codec, says: str) -> None:
    before = list(CODECS)
    with pytest.raises(kvist.PluginError, match=says) as told:
        kvist.register_codec(made, version="1")
    assert "\n" not in str(told.value)
    assert list(CODECS) == before


def test_codes_that_are_not_those_of_the_coding_are_refused() -> None:
    class Other(CodedCodec):
        def encode(self, x: Tensor, stream: Stream, frame: Frame) -> tuple[Tensor, ...]:
            return super().encode(x * 1.1, stream, frame)

    with pytest.raises(kvist.PluginError, match="encode gives other bytes than its coding, which the operators go by"):
        kvist.register_codec(Other("other", codec("int4").code), version="1")


# ---- families


@pytest.fixture
def twig(tmp_path: Path) -> Path:
    (tmp_path / "twig").mkdir()
    (tmp_path / "twig" / "config.json").write_text(json.dumps(FAMILY))
    return tmp_path / "twig"


@pytest.mark.parametrize(("kv", "weights"), [("fp32", None), ("turbo4", None), ("fp32", "int8")])
def test_a_family_of_somebody_else_is_read_and_exact(twig: Path, kv: str, weights: str | None) -> None:
    with pytest.raises(UnknownFamily, match="architecture 'twig' is not supported"):
        load_config(twig)
    kvist.register_family("twig", TWIG, version="1")
    check_family(twig, kv=kv, weights=weights)


def test_all_that_is_kept_of_a_model_belongs_to_the_version_of_its_family(
    twig: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    from kvist.testing.families import _write_random

    found: list[tuple[object, ...]] = []
    for version in ("1", "2"):
        forget(monkeypatch)
        kvist.register_family("twig", TWIG, version=version)
        if version == "1":
            _write_random(twig)
        loaded = open_model(str(twig))
        digest = loaded.weights_digest()
        packed = packed_path(twig, loaded.config, "int8", ())
        found.append((identify(loaded), model_digest(loaded.model, digest), packed))
    (one, *first), (two, *second) = found
    assert one.differences(two) == ["config"]  # type: ignore[attr-defined]
    assert not set(first) & set(second)


def test_what_is_no_family_is_refused(twig: Path) -> None:
    with pytest.raises(kvist.PluginError, match=r"'twig' of this program 1 is refused: it is no Family"):
        kvist.register_family("twig", llama.Llama, version="1")  # type: ignore[arg-type]
    with pytest.raises(kvist.PluginError, match="'llama' of this program has a name that is taken, by Kvist"):
        kvist.register_family("llama", TWIG, version="1")
    kvist.register_family("twig", Family(partial(llama.read, family="llama"), llama.Llama), version="1")
    with pytest.raises(kvist.PluginError, match="the family 'twig' reads a config that is not of the family 'twig'"):
        load_config(twig)
    assert list(FAMILIES)[-1] == "twig"


# ---- tiers


class Nameless(Held):
    name = "memory"


class Unclosed(Held):
    close = None


@pytest.fixture
def held() -> list[Held]:
    made: list[Held] = []

    def make(url: str) -> Held:
        made.append(Held(url))
        return made[-1]

    kvist.register_tier("held", make, version="1")
    return made


def test_a_tier_of_somebody_else_keeps_blocks(held: list[Held], tmp_path: Path) -> None:
    loaded = open_model(None)
    settings = KeepSettings(tmp_path / "kv", remote="held://here?secret=1", on_disk=False)
    with open_kept(loaded, settings) as kept:
        assert kept.remote is held[0]
        assert kept.describe()[0].startswith("shared through held://here: ")
        engine = loaded.engine(loaded.budget(1 << 24), kept)
        from kvist.runtime.request import Request, Sampling

        engine.add(Request(tuple(loaded.tokenizer().encode(TEXT)), 2, Sampling()))
        while not engine.idle:
            engine.step()
        assert kept.cache.flush(20)
        assert len(held[0].records) == kept.cache.counters.written["held"] > 3
    assert held[0].closed


def test_urls_of_no_tier(held: list[Held]) -> None:
    kvist.register_tier("lost", Nameless, version="1")
    kvist.register_tier("open", Unclosed, version="1")
    schemes = "redis://, rediss://, unix://, held://, lost://, open://"
    for url in ("shelf://user:hush@here", "held:/x", "", "://"):
        with pytest.raises(ConfigError, match=f"a URL that begins with one of {schemes}; not") as told:
            open_tier(url)
        assert "hush" not in str(told.value)
    with pytest.raises(kvist.PluginError, match="the tier 'lost' of this program 1 is refused: its name is 'memory'"):
        open_tier("lost://x")
    with pytest.raises(kvist.PluginError, match="the tier 'open' of this program 1 is refused: it has no method close"):
        open_tier("open://x")
    with pytest.raises(kvist.PluginError, match="'held' of this program 1 cannot be opened: RuntimeError") as told:
        open_tier("held://user:hush@wrong")
    assert "hush" not in str(told.value)
    for scheme in ("Held", "he_ld", "", "hé"):
        with pytest.raises(kvist.PluginError, match="its name is no scheme of a URL"):
            kvist.register_tier(scheme, Held, version="1")
    with pytest.raises(kvist.PluginError, match="'redis' of this program has a name that is taken, by Kvist"):
        kvist.register_tier("redis", Held, version="1")
    with pytest.raises(kvist.PluginError, match="it is nothing that can be called with a URL"):
        kvist.register_tier("other", 3, version="1")  # type: ignore[arg-type]
