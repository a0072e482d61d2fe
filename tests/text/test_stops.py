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


def marked(text: str, tokens: dict[str, int]) -> list[tuple[int, int, int]]:
    """Where the special tokens stand in a text; none of them begins another."""
    found = [(token, start) for token in tokens for start in range(len(text)) if text.startswith(token, start)]
    return [(tokens[token], start, start + len(token)) for token, start in sorted(found, key=lambda each: each[1])]


SPECIAL = {"<|im_end|>": 7, "<e>": 8}


@pytest.mark.parametrize("stop", ["<|im_end|>", "S<|im_end|>", "ES<|im_end|><e>", "<|im_end|><e>\n", "<e>"])
def test_a_special_token_is_seen_though_it_gives_no_text(stop: str) -> None:
    """However the text before it is cut into pieces."""
    stops = StopStrings([stop], lambda text: marked(text, SPECIAL))
    parts: list[str | int] = ["YES", 7, 8, "\nmore"] if stop != "<e>" else ["YES", 8]
    shown = {"<|im_end|>": "YES", "S<|im_end|>": "YE", "ES<|im_end|><e>": "Y", "<|im_end|><e>\n": "YES", "<e>": "YES"}
    for cut in range(4):
        matcher, text = StopMatcher(stops), ""
        for part in ["YES"[:cut], "YES"[cut:], *parts[1:]]:
            text += (
                matcher.push(part)
                if isinstance(part, str)
                else matcher.push_special(part)
                if matcher.sees(part)
                else ""
            )
        assert (text + matcher.finish(), matcher.matched) == (shown[stop], stop)


def test_the_same_characters_written_one_by_one_stop_as_well() -> None:
    matcher = StopMatcher(StopStrings(["S<|im_end|>"], lambda text: marked(text, SPECIAL)))
    assert "".join(matcher.push(character) for character in "YES<|im_end|>") == "YE"
    assert matcher.matched == "S<|im_end|>"


def test_a_special_token_that_no_stop_names_is_not_seen_and_hides_nothing() -> None:
    matcher = StopMatcher(StopStrings(["ab", "<|", "x<e>"], lambda text: marked(text, SPECIAL)))
    assert not matcher.sees(7)
    assert matcher.push("a") == ""
    assert matcher.sees(8)
    assert matcher.push_special(8) == "a", "what is held behind it cannot be a stop string any more"
    assert matcher.push("b") == "b"
    assert matcher.finish() == ""
    assert matcher.matched is None


def test_long_stop_strings_are_read_once() -> None:
    """The work of a character does not grow with what is held back: 16 stops of 4,000 characters, all but complete."""
    stops = StopStrings([f"{'a' * 3999}{chr(ord('A') + index)}" for index in range(16)])
    matcher = StopMatcher(stops)
    text = "".join(matcher.push("a" * 10) for _ in range(1000))
    assert len(text) == 10_000 - 3999
    assert text + matcher.push("C") == "a" * (10_000 - 3999)
    assert matcher.matched == "a" * 3999 + "C"
