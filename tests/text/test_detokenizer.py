"""Streaming detokenization: the pieces are the whole's text, and no piece is ever taken back."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from kvist.text.detokenizer import Detokenizer
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_bytes_bpe, train_characters

UNICODE = "naïve café, 日本語 🙂👩‍👩‍👧 \ufffd the them then\n"


def byte_level() -> tokenizers.Tokenizer:
    backend = train_bytes_bpe(UNICODE * 3, 290)
    backend.add_tokens([AddedToken("two words"), AddedToken("日本!")])
    return backend


def wrapped_byte_level() -> tokenizers.Tokenizer:
    """The same vocabulary with a decoder that does not show that it is byte-level."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's kind: pieces with `▁` for spaces, single bytes for what no piece covers."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "t",
        "h",
        "e",
        "▁t",
        "he",
        "▁the",
        "日",
    ]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<unk>"), AddedToken("<s>")])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return backend


BACKENDS = {
    "byte_level": byte_level(),
    "wrapped_byte_level": wrapped_byte_level(),
    "byte_fallback": byte_fallback(),
    "metaspace": metaspace(),
    "characters": train_characters(UNICODE),
}
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}


def assert_stream_is_whole(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    detokenizer = Detokenizer(tokenizer, skip_special)
    shown = ""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert tokenizer.decode(ids, skip_special).startswith(shown)
    assert shown + detokenizer.finish() == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("name", ["byte_level", "wrapped_byte_level", "byte_fallback", "metaspace"])
@settings(max_examples=120, derandomize=True, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("the 日🙂\ufffd"), max_size=20))
def test_text_streams_as_it_decodes(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert_stream_is_whole(tokenizer, tokenizer.encode(text), skip_special=True)


@pytest.mark.parametrize("name", list(TOKENIZERS))
@settings(max_examples=200, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    encoded = st.sampled_from([*tokenizer.encode("the them 日 \n" if name != "characters" else UNICODE), 0, 1])
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2) | encoded, max_size=12))
    assert_stream_is_whole(tokenizer, ids, skip_special=data.draw(st.booleans()))


def test_no_piece_ends_within_a_character() -> None:
    for name in ("byte_level", "wrapped_byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("🙂é the")
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token_id) for token_id in ids]
        assert "" in pieces  # some character is of several tokens
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == "🙂é the"
        assert detokenizer.finish() == ""


def test_text_comes_as_soon_as_it_is_settled() -> None:
    for name in ("byte_level", "byte_fallback", "characters"):
        tokenizer = TOKENIZERS[name]
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("the the")]
        assert all(pieces)
        assert detokenizer.finish() == ""


def test_an_incomplete_character_is_replaced_at_the_end_only() -> None:
    for name in ("byte_level", "wrapped_byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("e🙂")[:-1]
        detokenizer = Detokenizer(tokenizer)
        assert "".join(detokenizer.push(token_id) for token_id in ids) == "e"
        rest = detokenizer.finish()
        assert set(rest) == {"\ufffd"}
        assert "e" + rest == tokenizer.decode(ids)


def test_a_stream_of_bytes_that_are_no_text_is_not_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    continuation = BACKENDS["byte_level"].token_to_id("Ģ")  # byte 0x80
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(continuation) for _ in range(5)] == ["\ufffd"] * 5


def test_the_oracle_tells_streams_apart() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("the 🙂 the")
    alone = "".join(tokenizer.decode([token_id]) for token_id in ids)
    assert alone != tokenizer.decode(ids)
