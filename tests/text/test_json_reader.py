"""JSON is read character by character as Python's own reader reads it whole."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.text.json_reader import JsonReader, Read

LENIENT = json.JSONDecoder(strict=False)  # takes bare control characters in strings, as models write them
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
# Without the letters of NaN and Infinity, which only Python's reader takes.
SCRAPS = st.lists(
    st.sampled_from(
        [
            "{", "}", "[", "]", ",", ":", '"', "\\", '\\"', "\\u00e9", "\\ud800", "\\x", "u", "tru", "true", "false",
            "null", "-", "0", "1", "12", ".", "e", "E+", " ", "\n", "\t", "\x01", "é日", '""', '"a":', "[]", "{}", "1,",
        ]
    ),
    max_size=12,
).map("".join)  # fmt: skip


def read(text: str) -> tuple[Read, int, str]:
    """What the last character that was pushed came to, how many belong to the value, and the value's text."""
    reader = JsonReader()
    for count, character in enumerate(text):
        result = reader.push(character)
        if result is not Read.TAKEN:
            return result, count + (result is Read.LAST), reader.text
    return Read.TAKEN, len(text), reader.text


def expected(text: str) -> tuple[Any, int] | None:
    """The value that a text begins with and where it ends, by Python's reader; None where there is none."""
    start = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        return LENIENT.raw_decode(text, start)
    except ValueError:
        return None


@settings(max_examples=150)
@given(value=VALUES, indent=st.sampled_from([None, 2]), ascii_only=st.booleans(), space=st.sampled_from(["", " \n\t"]))
def test_every_value_is_read_to_its_end_and_no_further(
    value: Any, indent: int | None, ascii_only: bool, space: str
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    result, end, told = read(f"{space}{text} ,")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    assert result is (Read.AFTER if number else Read.LAST)
    assert end == len(space + text)
    assert json.loads(told) == value


@settings(max_examples=400)
@given(text=SCRAPS)
def test_scraps_are_values_where_python_says_so(text: str) -> None:
    text += " "  # a number ends with what comes after it
    found, (result, end, told) = expected(text), read(text)
    if result in (Read.LAST, Read.AFTER):
        assert found is not None
        assert (json.loads(told), end) == found
    if result is Read.BAD or result is Read.TAKEN:
        # "1.x" and "1e" have a value at their head for Python; RFC 8259 has no value that goes on so.
        assert found is None or isinstance(found[0], int | float)


@settings(max_examples=300)
@given(value=VALUES, cut=st.integers(0, 60), scrap=SCRAPS)
def test_what_is_bad_is_no_beginning_of_a_value(value: Any, cut: int, scrap: str) -> None:
    text = json.dumps(value)
    assert read(text[:cut])[0] is not Read.BAD
    result, end, _ = read(text[:cut] + scrap)
    if result is Read.BAD:
        assert expected((text[:cut] + scrap)[: end + 1] + " ") is None or text[:1] in "-0123456789"


@pytest.mark.parametrize(
    "text",
    [
        "01", "-x", "1.x", "1e ", "+1", ".5", "tru ", "nul}", "NaN", '"\\x"', '"\\u12g4"', "[1,]", "[,1]", '{"a" 1}',
        '{"a":1,}', "{1:2}", "{]", "[}", "]", ",", ":", "'a'", '{"a":1 "b":2}', "[1 2]", '"\\\n"',
    ],
)  # fmt: skip
def test_what_is_no_json_is_bad(text: str) -> None:
    assert read(text + " ")[0] is not Read.LAST
    if text != "01":  # a number, and something else after it
        assert read(text + " ")[0] is Read.BAD


def test_what_json_cannot_hold_bare_is_given_its_escape() -> None:
    written = '{"a\n": "line\tline\x01\ud800\\n é", "b": "\x7f"}'
    result, _, told = read(written)
    assert result is Read.LAST
    assert told == '{"a\\n": "line\\tline\\u0001\\ud800\\n é", "b": "\x7f"}'
    assert json.loads(told.encode()) == LENIENT.decode(written)
    assert read('["a"\n\t,\r1]')[2] == '["a"\n\t,\r1]', "between strings it stays"


def test_values_are_nested_only_so_deep() -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = opening * 256 + "1" + closing * 256
        assert read(text)[0] is Read.LAST
        assert read(opening + text + closing)[0] is Read.BAD


def test_a_text_can_be_taken_piece_by_piece() -> None:
    reader, told = JsonReader(), []
    for character in ' {"a": [1, "}"]}':
        reader.push(character)
        told.append(reader.take())
    assert (told[0], told[1], "".join(told)) == ("", "{", '{"a": [1, "}"]}')
    assert reader.text == ""
    assert reader.first == "{"
