"""Packages that are installed for one test, and registries that forget what it registers."""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packages import Install, forget


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget(monkeypatch)
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("plugged", "kvist_example")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install("twig", "1.0", codecs={"int3": "plugged:INT3"}, plugged="source")`: as pip leaves a package behind."""

    def install(package: str, version: str, *, modules: Mapping[str, str], **groups: Mapping[str, str]) -> None:
        site = tmp_path / f"{package}-{version}"
        info = site / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = []
        for group, points in groups.items():
            lines += [f"[kvist.{group}]", *(f"{name} = {where}" for name, where in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(str(site))

    return install
