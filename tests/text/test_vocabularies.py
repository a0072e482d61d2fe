"""Vocabularies made from a corpus: round trips, agreement with transformers, the same every time."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.base.errors import TextError
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import END_OF_TEXT, save_tokenizer, train_bytes_bpe, train_characters

CORPUS = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. é 🙂\r\n\t" * 3
BYTES = train_bytes_bpe(CORPUS, 310)


def test_characters_are_one_token_each_in_code_point_order() -> None:
    backend = train_characters(CORPUS)
    alphabet = sorted(set(CORPUS))
    assert backend.get_vocab() == {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode(CORPUS) == [alphabet.index(character) for character in CORPUS]
    assert tokenizer.decode(tokenizer.encode(CORPUS)) == CORPUS
    assert tokenizer.eos_ids == frozenset()


def test_bytes_come_whole_and_merges_shorten_the_corpus() -> None:
    assert BYTES.get_vocab_size() == 310
    assert BYTES.token_to_id(END_OF_TEXT) == 0
    plain = train_bytes_bpe(CORPUS, 257)
    assert plain.get_vocab_size() == 257
    assert len(plain.encode(CORPUS).ids) == len(CORPUS.encode())
    assert len(BYTES.encode(CORPUS).ids) < 0.6 * len(CORPUS.encode())
    assert "ĊĊ" in train_bytes_bpe("a\n\n\nb" * 20, 258).get_vocab()  # merges cross the ends of lines


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(max_size=40))
def test_every_text_survives_byte_level_bpe(text: str) -> None:
    tokenizer = Tokenizer(BYTES)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_the_same_corpus_gives_the_same_vocabulary() -> None:
    assert train_bytes_bpe(CORPUS, 310).to_str() == BYTES.to_str()
    assert train_characters(CORPUS[::-1]).to_str() == train_characters(CORPUS).to_str()
    assert train_bytes_bpe(CORPUS.upper(), 310).to_str() != BYTES.to_str()


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_transformers_loads_what_is_saved_and_agrees(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    eos = END_OF_TEXT if kind == "bytes" else None
    save_tokenizer(BYTES if kind == "bytes" else train_characters(CORPUS), tmp_path, eos)
    ours, oracle = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(oracle) == ours.vocab_size
    assert oracle.eos_token == eos
    assert ours.eos_ids == ({0} if eos else frozenset())
    for text in (CORPUS, "  Speak ,  speak .", "\r\n\n", ""):
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert ours.decode(ids) == oracle.decode(ids) == text


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    for train in (train_characters, lambda corpus: train_bytes_bpe(corpus, 300)):
        with pytest.raises(TextError, match="corpus is empty"):
            train("")
        with pytest.raises(TextError, match=r"lone surrogate U\+DC00"):
            train("a\udc00")
    with pytest.raises(TextError, match="at least 257 tokens, got 256"):
        train_bytes_bpe(CORPUS, 256)
    with pytest.raises(TextError, match="no token '</s>'"):
        save_tokenizer(BYTES, tmp_path / "out", eos="</s>")
    assert not (tmp_path / "out").exists()
