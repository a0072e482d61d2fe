"""Tokenizers of checkpoints: what transformers says is the oracle, mistakes get one line."""

import json
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, models

from kvist.base.errors import TextError
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import END_OF_TEXT, save_tokenizer, train_bytes_bpe, train_characters

CORPUS = "It was the best of times, it was the worst of times; naïve 日本 🙂\n\n" * 4


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(train_bytes_bpe(CORPUS, 290), tmp_path)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(TextError) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_end_of_text_ids_are_gathered_from_every_file(folder: Path) -> None:
    assert Tokenizer.load(folder).eos_ids == frozenset()
    write(folder / "config.json", {"eos_token_id": 7})
    assert Tokenizer.load(folder).eos_ids == {7}
    write(folder / "generation_config.json", {"eos_token_id": [8, 9]})
    assert Tokenizer.load(folder).eos_ids == {7, 8, 9}
    write(folder / "tokenizer_config.json", {"eos_token": {"content": END_OF_TEXT}, "bos_token": None})
    end = Tokenizer.load(folder)
    assert end.eos_ids == {0, 7, 8, 9}
    assert end.bos_id is None
    write(folder / "special_tokens_map.json", {"bos_token": END_OF_TEXT, "eos_token": "unheard of"})
    write(folder / "tokenizer_config.json", {})
    write(folder / "config.json", {"eos_token_id": None})
    begin = Tokenizer.load(folder)
    assert begin.eos_ids == {8, 9}
    assert begin.bos_id == 0


@pytest.mark.parametrize("value", ["2", [1, "2"], True, -1, {"id": 2}, [None]])
def test_an_end_of_text_id_that_is_none_is_refused(folder: Path, value: object) -> None:
    write(folder / "generation_config.json", {"eos_token_id": value})
    assert "generation_config.json: eos_token_id should be a token id" in refusal(folder)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    assert "tokenizer_config.json holds a JSON list" in refusal(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json is not a tokenizer that can be read" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "holds neither tokenizer.json nor vocab.json with merges.txt" in refusal(folder)
    write(folder / "vocab.json", {"a": 0})
    (folder / "merges.txt").write_text("a\n")
    assert "vocab.json and merges.txt cannot be read" in refusal(folder)


def test_the_two_files_of_gpt2_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast

    trained = train_bytes_bpe(CORPUS, 290)
    trained.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    ours = Tokenizer.load(tmp_path)
    oracle = GPT2TokenizerFast.from_pretrained(tmp_path)
    assert ours.vocab_size == 290
    assert ours.special_ids == {0}
    for text in (CORPUS, "", " leading", f"a{END_OF_TEXT}b", "tabs\tand\r\nlines", "🙂 é"):
        ids = ours.encode(text)
        assert ids == oracle(text)["input_ids"] == trained.encode(text).ids
        assert ours.decode(ids, skip_special=False) == text
    assert ours.decode(ours.encode(f"a{END_OF_TEXT}b")) == "ab"


def test_a_file_that_says_two_things_is_refused(folder: Path) -> None:
    """Where the library would take the last: an id of a token, a part of the model, what ends a text."""
    whole = (folder / "tokenizer.json").read_text()
    for old, new, said in (
        ('"vocab":', '"vocab": {"a": 7}, "vocab":', "'vocab' twice"),
        ('"a":', '"a": 7, "a":', "'a' twice, 7 and "),
        ('"added_tokens":', '"added_tokens": [], "added_tokens":', "'added_tokens' twice"),
    ):
        spoiled = re.sub(re.escape(old) + r"\s*", new, whole, count=1)
        assert spoiled != whole
        (folder / "tokenizer.json").write_text(spoiled)
        with pytest.raises(TextError, match=rf"tokenizer\.json says {said}"):
            Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text(whole)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text('{"eos_token_id": 1, "eos_token_id": 2}')
        with pytest.raises(TextError, match=rf"{name} says 'eos_token_id' twice, 1 and 2"):
            Tokenizer.load(folder)
        (folder / name).unlink()
    (folder / "tokenizer.json").unlink()
    for name, content in (("vocab.json", '{"a": 0, "b": 1, "a": 2}'), ("merges.txt", "#version: 0.2\n")):
        (folder / name).write_text(content)
    with pytest.raises(TextError, match=r"vocab\.json says 'a' twice, 0 and 2"):
        Tokenizer.load(folder)


def test_special_tokens_are_added_as_the_file_says_and_skipped_on_request() -> None:
    backend = train_bytes_bpe(CORPUS, 290)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    tokenizer = Tokenizer(backend, eos_ids=[0], bos_id=0)
    ids = tokenizer.encode("the times")
    assert ids[0] == 0
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "the times"
    assert tokenizer.decode(ids, skip_special=False) == f"{END_OF_TEXT}the times"
    assert tokenizer.token(0) == END_OF_TEXT
    assert tokenizer.token(10_000) is None
    assert tokenizer.decode([10_000]) == ""


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    backend = train_bytes_bpe(CORPUS, 290)
    whole = backend.encode(CORPUS).ids
    backend.enable_truncation(5)
    backend.enable_padding(length=9)
    assert len(backend.encode(CORPUS).ids) == 9
    save_tokenizer(backend, tmp_path)
    assert Tokenizer.load(tmp_path).encode(CORPUS) == whole


def test_a_character_that_the_vocabulary_lacks_is_named_with_the_vocabulary() -> None:
    tokenizer = Tokenizer(train_characters("abc\n"))
    with pytest.raises(TextError) as caught:
        tokenizer.encode("bada")
    assert str(caught.value) == "'d' is not among the 4 characters of this model's vocabulary: '\\nabc'"
    large = Tokenizer(train_characters("".join(map(chr, range(0x4E00, 0x4F00)))))
    with pytest.raises(TextError, match=r"'a' is not among the 256 characters of .*\.\.\.'$") as caught:
        large.encode("a")
    assert len(str(caught.value)) < 200


def test_text_that_is_no_text_is_refused(folder: Path) -> None:
    for tokenizer in (Tokenizer.load(folder), Tokenizer(train_characters("abc"))):
        with pytest.raises(TextError, match=r"lone surrogate U\+D83D"):
            tokenizer.encode("a\ud83d")


def test_added_tokens_that_are_not_special_are_text() -> None:
    backend = train_bytes_bpe(CORPUS, 290)
    backend.add_tokens([AddedToken("two words", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.vocab_size == 291
    assert tokenizer.special_ids == {0}
    assert tokenizer.encode("two words") == [290]
    assert tokenizer.decode([290]) == "two words"
    assert isinstance(backend.model, models.BPE)
