"""Stop strings: a stream gives what the whole text gives, wherever it is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.base.errors import RequestError
from kvist.text.stops import StopMatcher, StopStrings

stop_lists = st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3)


def cut_by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read the text character by character; stop at the first end of a stop string, at the longest one."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, derandomize=True, deadline=None)
@given(text=st.text("ab<é ", max_size=24), stops=stop_lists, data=st.data())
def test_a_stream_gives_what_the_whole_gives(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopMatcher(StopStrings(stops))
    shown = "".join(matcher.push(piece) for piece in pieces)
    assert (shown + matcher.finish(), matcher.matched) == cut_by_definition(text, stops)


def test_every_split_point_of_a_matching_text() -> None:
    text, stops = "one <|im_end|> two\n\nUser: three", ["\n\nUser:", "<|im_end|>", "<|im_start|>"]
    for cut in range(len(text) + 1):
        matcher = StopMatcher(StopStrings(stops))
        assert matcher.push(text[:cut]) + matcher.push(text[cut:]) + matcher.finish() == "one "
        assert matcher.matched == "<|im_end|>"


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    matcher = StopMatcher(StopStrings(["<end>", "abab!"]))
    assert matcher.push("text <") == "text "
    assert matcher.push("en") == ""
    assert matcher.push("t> aba") == "<ent> "
    assert matcher.push("ba") == "ab"  # "aba" may still become "abab!"
    assert matcher.finish() == "aba"
    assert matcher.matched is None


def test_the_first_to_be_complete_wins_and_of_equal_ends_the_longest() -> None:
    early = StopMatcher(StopStrings(["abcd", "bc"]))
    assert early.push("xabcd") == "xa"
    assert early.matched == "bc"
    long = StopMatcher(StopStrings(["bc", "abc"]))
    assert long.push("xabc") == "x"
    assert long.matched == "abc"
    assert long.push("more") == ""
    assert long.finish() == ""


def test_without_stop_strings_everything_passes_and_an_empty_one_is_refused() -> None:
    assert StopMatcher(StopStrings([])).push("text") == "text"
    with pytest.raises(RequestError, match="a stop string is empty"):
        StopMatcher(StopStrings(["ok", ""]))
