"""What errors tell people to type."""

import re
import tomllib
from pathlib import Path

import kvist
from kvist.base.errors import install

REPOSITORY = Path(__file__).parents[2]


def test_every_extra_that_is_named_can_be_installed() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    source = "\n".join(path.read_text() for path in Path(kvist.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"""install\(['"](\w+)['"]\)""", source))
    assert {"plots", "pdf", "remote", "hf", "bench"} <= named <= extras.keys()
    assert source.count("pip install") == 1, "the way to install is said in one place"
    assert install("pdf") == "pip install -e '.[pdf]' in Kvist's checkout"
