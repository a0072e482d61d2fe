"""Names and who made what they stand for; what packages offer is imported when it is asked for, and not before."""

import sys
from importlib import metadata

import pytest
from packages import INT3, Install, forget

import kvist
from kvist.base.registry import Registry
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import CODECS, codec
from kvist.cache.codecs.coded import CodedCodec
from kvist.models.families import FAMILIES


def test_what_a_package_offers_is_imported_when_it_is_asked_for(install: Install) -> None:
    install("twig", "1.2", codecs={"int3": "plugged_twig:INT3"}, modules={"plugged_twig": INT3})
    assert list(CODECS)[-1] == "int3"
    assert "plugged_twig" not in sys.modules
    found = codec("int3")
    assert isinstance(found, CodedCodec)
    assert found is codec("int3") is dict(CODECS)["int3"]
    assert CODECS.versions(["int3", "turbo4", "nothing"]) == {"int3": "twig 1.2"}
    assert parse_choice("turbo4,0:int3").plugins == {"int3": "twig 1.2"}


def test_a_name_of_ours_reads_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**params: str) -> None:
        raise AssertionError("metadata was read")

    monkeypatch.setattr(metadata, "entry_points", refuse)
    assert parse_choice("k=int8,v=turbo4").plugins == {}
    assert FAMILIES["llama"]
    assert CODECS.versions(["turbo4", "int3"]) == {}
    with pytest.raises(AssertionError, match="metadata was read"):
        codec("int3")


def test_one_of_the_program_itself() -> None:
    mine = CodedCodec("mine", codec("int4").code)
    kvist.register_codec(mine, version="7")
    assert codec("mine") is mine
    assert CODECS.versions(["mine"]) == {"mine": "this program 7"}
    kvist.register_codec(mine, version="7")  # which changes nothing
    with pytest.raises(kvist.PluginError, match="'mine' of this program has a name that is taken, by this program 7"):
        kvist.register_codec(mine, version="8")
    with pytest.raises(kvist.PluginError, match="taken, by this program 7"):
        kvist.register_codec(CodedCodec("mine", codec("turbo4").code), version="7")
    for version in ("", "1\n", "x" * 65, 7):
        with pytest.raises(kvist.PluginError, match="a version is a text"):
            kvist.register_codec(CodedCodec("other", mine.code), version=version)  # type: ignore[arg-type]
    assert "other" not in CODECS


def test_names_that_are_taken(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kvist.PluginError, match="'int8' of this program has a name that is taken, by Kvist"):
        kvist.register_codec(CodedCodec("int8", codec("int4").code), version="1")
    install("twig", "1.2", codecs={"int3": "plugged_twig:INT3"}, modules={"plugged_twig": INT3})
    with pytest.raises(kvist.PluginError, match=r"'int3' of this program has .* taken, by twig 1\.2"):
        kvist.register_codec(CodedCodec("int3", codec("int4").code), version="1")
    install("branch", "3", codecs={"int3": "plugged_branch:INT3"}, modules={"plugged_branch": INT3})
    for ask in (lambda: codec("int3"), lambda: list(CODECS), lambda: codec("int5")):
        with pytest.raises(kvist.PluginError, match=r"'int3' is offered by branch 3 and by twig 1\.2; uninstall one"):
            ask()
    assert not any(name.startswith("plugged") for name in sys.modules)


def test_a_package_that_offers_a_name_of_ours_is_not_used_and_told_of(install: Install) -> None:
    install("rot", "1", codecs={"int8": "plugged_rot:INT3"}, modules={"plugged_rot": INT3})
    assert codec("int8").name == "int8"
    for ask in (lambda: list(CODECS), lambda: codec("int5"), lambda: len(CODECS)):
        with pytest.raises(kvist.PluginError, match=r"'int8' of rot 1 has a name that is taken, by Kvist"):
            ask()
    assert "plugged_rot" not in sys.modules


@pytest.mark.parametrize(
    ("where", "source", "says"),
    [
        ("plugged_bad:X", "import nothing_of_that_name", "cannot be imported: ModuleNotFoundError: No module named"),
        ("plugged_bad:X", "raise ValueError('two\\nlines')", "cannot be imported: ValueError: two lines$"),
        ("plugged_bad:X", "def (", "cannot be imported: SyntaxError"),
        ("plugged_bad:X", "Y = 3", "cannot be imported: AttributeError: .*no attribute 'X'"),
        ("plugged_bad", "Y = 3", "is refused: its in_place is neither True nor False"),
        ("plugged_bad:X", "X = 3", "is refused: its in_place is neither True nor False"),
        ("plugged_bad:INT3", INT3.replace('"int3"', '"int4x"'), "is refused: its own name is another one"),
    ],
)
def test_what_cannot_be_used(where: str, source: str, says: str, install: Install) -> None:
    install("bad", "0.1", codecs={"int3": where}, modules={"plugged_bad": source})
    for _ in range(2):
        with pytest.raises(kvist.PluginError, match=rf"the KV codec 'int3' of bad 0\.1 {says}") as told:
            codec("int3")
        assert "\n" not in str(told.value)
    assert "int3" in list(CODECS)


def test_other_versions_are_told_apart(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("twig", "1", codecs={"int3": "plugged_twig:INT3"}, modules={"plugged_twig": INT3})
    codec("int3")
    install("twig", "2", codecs={"int3": "plugged_twig:INT3"}, modules={"plugged_twig": INT3})
    assert CODECS.versions(["int3"]) == {"int3": "twig 1"}, "one process has one version"
    forget(monkeypatch)
    codec("int3")
    assert CODECS.versions(["int3"]) == {"int3": "twig 2"}


def test_it_holds_anything() -> None:
    numbers: Registry[int] = Registry("number", "kvist.numbers", lambda name, value: None if value > 0 else "too small")
    numbers.register("none", 0)
    numbers.register("one", 1, "1")
    assert dict(numbers) == {"none": 0, "one": 1}
    assert numbers.find("two") is None
    assert numbers.get("two") is None
    with pytest.raises(KeyError):
        numbers["two"]
    with pytest.raises(kvist.PluginError, match="the number 'two' of this program 1 is refused: too small"):
        numbers.register("two", -2, "1")
    with pytest.raises(kvist.PluginError, match="the number 'three' of this program 1 fails: TypeError"):
        numbers.register("three", "3", "1")  # type: ignore[arg-type]
    with pytest.raises(kvist.PluginError, match="'none' of this program has a name that is taken, by Kvist"):
        numbers.register("none", 1, "1")
