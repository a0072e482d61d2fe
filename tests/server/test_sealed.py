"""Reasoning as clients carry it back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.server.sealed import seal, signature_of, unseal


@given(st.text(), st.text())
def test_what_is_sealed_comes_back_and_signatures_tell_texts_apart(text: str, other: str) -> None:
    assert unseal(seal(text)) == text
    assert signature_of(text)
    assert (signature_of(text) == signature_of(other)) == (text == other)


@pytest.mark.parametrize("foreign", ["", "x", "gAAAAABo", "kvist1.", "kvist1.!!!", "kvist1.AAAA", "kvist1.\u00e9"])
def test_what_another_wrote_is_none(foreign: str) -> None:
    assert unseal(foreign) is None


def test_what_was_cut_or_changed_is_none() -> None:
    sealed = seal("I think of a number: 27.")
    assert unseal(sealed[:-4]) is None
    changed = "B" if sealed[-1] != "B" else "C"
    assert unseal(sealed[:-1] + changed) is None
    assert unseal(signature_of("a")) is None
