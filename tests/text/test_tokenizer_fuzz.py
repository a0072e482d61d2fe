"""Hostile and absurd files of a tokenizer: each ends soon, in a tokenizer or in one short line."""

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from hostile import compile_once, ends, fuzz
from kvist.base.errors import KvistError, TextError
from kvist.service.sampling import read_proposed
from kvist.service.text_stream import TextStream, stop_strings
from kvist.text.chat import ChatTemplate
from kvist.text.gguf_tokenizer import GgufVocabulary, build
from kvist.text.tokenizer import TOKENIZER, Tokenizer
from kvist.text.training import END_OF_TEXT, train_bytes_bpe, train_characters

INPUTS = 250
SHORT = [
    0,
    1,
    -1,
    2**31,
    2**63,
    10**300,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "a",
    "\ud800",
    [],
    {},
]
LONG = ["x" * 200_000, "a\n" * 500, [1] * 5000, ["a"] * 5000, {str(index): index for index in range(3000)}, [[[[]]]]]
HOSTILE: list[Any] = [*SHORT, *SHORT, *LONG]
CONFIGS = {
    "tokenizer_config.json": {
        "bos_token": {"content": END_OF_TEXT, "rstrip": False},
        "eos_token": END_OF_TEXT,
        "chat_template": "{{ messages[0].content }}",
        "added_tokens_decoder": {"0": {"content": END_OF_TEXT, "special": True}},
    },
    "special_tokens_map.json": {"eos_token": {"content": END_OF_TEXT}, "unk_token": "<unk>"},
    "generation_config.json": {
        "eos_token_id": [0, 1],
        "temperature": 0.6,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "stop_strings": ["\n"],
    },
    "config.json": {"eos_token_id": 0},
}


def tokenizer_files() -> list[dict[str, Any]]:
    """Byte-level, of characters, and SentencePiece's with bytes to fall back on."""
    byte_level = train_bytes_bpe("the times it was the best of times\n" * 4, 290)
    byte_level.add_tokens([AddedToken("<|x|>", rstrip=True, normalized=False)])
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", "a", "b", "ab", "\u2581ab"]
    facts: dict[str, Any] = {
        "types": [2, 3, 3, *[6] * 256, *[1] * 5],
        "scores": [-float(n) for n in range(len(pieces))],
    }
    special = {"bos": 1, "eos": 2, "unknown": 0, "adds_bos": True, "adds_eos": False, "adds_space": True}
    spaced = build(GgufVocabulary("llama", pieces, merges=[], pre="default", **facts, **special), "test")
    return [json.loads(backend.to_str()) for backend in (byte_level, train_characters("abc \n"), spaced)]


def spoil(value: Any, generator: random.Random) -> Any:
    """A copy in which one value, at any depth, is another or is gone."""
    place = root = {"": copy.deepcopy(value)}
    key: Any = ""
    while isinstance(place[key], dict | list) and place[key] and generator.random() < 0.8:
        place = place[key]
        key = generator.choice(list(place)) if isinstance(place, dict) else generator.randrange(len(place))
    if generator.random() < 0.2 and place is not root:
        del place[key]
    else:
        place[key] = generator.choice(HOSTILE)
    return root[""]


def tokenize(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("ab a<|x|> the times")
    stream = TextStream(tokenizer, tokenizer.eos_ids, stop_strings(tokenizer, ["a\n", END_OF_TEXT]))
    _ = "".join(stream.push(token) for token in ids) + stream.finish()
    tokenizer.decode(ids)


def read(folder: Path) -> None:
    """All that is read of one folder; what each of them says when it refuses is looked at."""
    whole = [ends(partial(reader, folder)) for reader in (tokenize, read_proposed, ChatTemplate.load)]
    if not all(whole):
        raise KvistError("refused")


def write(folder: Path, files: dict[str, Any]) -> None:
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value))


@pytest.fixture(autouse=True)
def _compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_once(monkeypatch)


def test_the_files_are_whole_before_they_are_spoiled(tmp_path: Path) -> None:
    for whole, spells in zip(tokenizer_files(), [True, False, True], strict=True):
        write(tmp_path, CONFIGS | {TOKENIZER: whole})
        assert ends(lambda: read_proposed(tmp_path))
        assert ends(lambda: ChatTemplate.load(tmp_path))
        if spells:
            assert ends(lambda: tokenize(tmp_path))
        else:  # a vocabulary of characters has few
            with pytest.raises(TextError, match="is not among the"):
                tokenize(tmp_path)


def test_hostile_files(tmp_path: Path) -> None:
    whole = tokenizer_files()

    def prepare(generator: random.Random) -> Callable[[], object]:
        files = CONFIGS | {TOKENIZER: generator.choice(whole)}
        name = generator.choice([*files, TOKENIZER, TOKENIZER, TOKENIZER])
        write(tmp_path, files | {name: spoil(files[name], generator)})
        return partial(read, tmp_path)

    assert 0 < fuzz("tokenizers and their configs", INPUTS, prepare) < 1


def test_a_tokenizer_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / TOKENIZER))
    monkeypatch.setattr("kvist.text.tokenizer._MOST_BYTES", 10)
    with pytest.raises(TextError, match="larger than 10 bytes"):
        Tokenizer.load(tmp_path)
