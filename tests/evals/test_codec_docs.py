"""docs/codecs.md: its code runs, and its table says what is measured."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kvist.cache.codecs import CODECS
from kvist.cache.spec import Role, Stream
from kvist.evals.codecs import distortion, logit_correlation
from kvist.ops.coding import Frame

DOC = Path(__file__).parents[2] / "docs" / "codecs.md"


@pytest.fixture(scope="module")
def text() -> str:
    return DOC.read_text()


def test_the_worked_example_runs_and_comes_back(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    module = ModuleType("int3")
    monkeypatch.setitem(sys.modules, "int3", module)
    scope = vars(module)
    exec(blocks[0], scope)
    exec(blocks[1], {})  # a file of its own
    codec, stream, frame = scope["INT3"], Stream("v", Role.VALUES, 2, 64), Frame.plain(2, 64)
    x = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(0))
    planes = codec.encode(x, stream, frame)
    assert [(tuple(p.shape), p.dtype) for p in planes] == [(p.shape, p.dtype) for p in codec.planes(stream, 64)]
    decoded = codec.decode(planes, stream, frame)
    assert 0.02 < float(((decoded - x) ** 2).sum() / (x**2).sum()) < 0.08


def rows(text: str) -> dict[str, list[float]]:
    found = re.findall(r"^\| `([\w.-]+)` \|((?: [-\d.e]+ \|){6})$", text, re.MULTILINE)
    return {name: [float(cell) for cell in cells.strip(" |").split("|")] for name, cells in found}


def test_the_table_has_every_codec(text: str) -> None:
    assert list(rows(text)) == list(CODECS)


@pytest.mark.parametrize("name", list(CODECS))
def test_the_table_is_what_is_measured(text: str, name: str) -> None:
    bits_64, bits_128, keys, values, products, bias = rows(text)[name]
    found = distortion(CODECS[name], 128, 2048)
    assert found.bits == bits_128
    assert distortion(CODECS[name], 64, 64).bits == bits_64
    assert found.key_error == pytest.approx(keys, rel=0.02)
    assert found.value_error == pytest.approx(values, rel=0.02)
    assert found.product_error == pytest.approx(products, rel=0.03)
    assert found.bias == pytest.approx(bias, abs=5 * found.bias_deviation + 5e-4)


def test_what_centring_is_said_to_be_worth(text: str) -> None:
    plain, centred = re.search(
        r"`turbo3` is (\.\d+)\.\nLess their mean, coded the same way, it is (\.\d+)", text
    ).groups()
    found = logit_correlation(CODECS["turbo3"], 128)
    assert found.plain == pytest.approx(float(plain), abs=0.01)
    assert found.centred == pytest.approx(float(centred), abs=0.001)
