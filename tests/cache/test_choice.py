"""Which codec holds which stream, as people write it."""

import pytest

from kvist.base.errors import ConfigError
from kvist.cache.choice import KvChoice, parse_choice
from kvist.cache.codecs import codec
from kvist.cache.layout import plan_layout
from kvist.cache.spec import key_value


def names(choice: KvChoice, layers: int) -> list[str]:
    return [f"{choice.codec(layer, 'k').name}/{choice.codec(layer, 'v').name}" for layer in range(layers)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16", ["bf16/bf16"] * 3),
        ("k=int8,v=turbo4", ["int8/turbo4"] * 3),
        ("turbo4,0:bf16", ["bf16/bf16", "turbo4/turbo4", "turbo4/turbo4"]),
        ("turbo3,0-1:k=int8,2:v=fp16", ["int8/turbo3", "int8/turbo3", "turbo3/fp16"]),
        ("turbo2,0-2:bf16,1:k=int8,1:v=turbo4", ["bf16/bf16", "int8/turbo4", "bf16/bf16"]),
        (" turbo2.5 , 1:int4-rot ", ["turbo2.5/turbo2.5", "int4-rot/int4-rot", "turbo2.5/turbo2.5"]),
    ],
)
def test_what_stands_further_right_wins(text: str, expected: list[str]) -> None:
    assert names(parse_choice(text), 3) == expected


def test_a_choice_reads_back_as_it_is_written() -> None:
    choice = parse_choice("turbo4, 0-1:bf16 ,2:k=int8")
    assert choice.name == "turbo4,0-1:bf16,2:k=int8"
    assert names(parse_choice(choice.name), 3) == names(choice, 3)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("turbo9", "there is no KV codec 'turbo9'; choose one of fp32, bf16"),
        ("k=turbo9,v=bf16", "there is no KV codec 'turbo9'"),
        ("", "cannot read ''"),
        ("turbo4,", "cannot read ''"),
        ("k:turbo4", "cannot read 'k:turbo4'"),
        ("turbo4,3-1:bf16", "layers 3 to 1 are none"),
        ("turbo4,2:bf16", "the model's layers are 0 to 1"),
        ("turbo4,latent=bf16", "no stream 'latent'; streams are k, v"),
        ("bf16,turbo4", "turbo4 leaves nothing of bf16"),
        ("0:bf16,turbo2", "turbo2 leaves nothing of 0:bf16"),
        ("turbo4,1:bf16,0-1:fp16", "0-1:fp16 leaves nothing of 1:bf16"),
        ("v=int8,k=turbo4,v=bf16", "v=bf16 leaves nothing of v=int8"),
        ("k=turbo4", "says nothing of stream 'v' of layer 0"),
        ("1:bf16", "says nothing of stream 'k' of layer 0"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_in_one_line(text: str, finding: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_layout([key_value(2, 64)] * 2, parse_choice(text))
    assert finding in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dim", [24, 40, 520])
def test_a_head_size_that_no_code_holds_is_refused(dim: int) -> None:
    with pytest.raises(ConfigError, match="turbo4 cannot hold the stream 'k': coded heads have a multiple of 16"):
        plan_layout([key_value(1, dim)], codec("turbo4"))
