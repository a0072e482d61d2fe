"""From tokens to text up to a stop string, over tokens that give no text."""

from tokenizers import AddedToken

from kvist.service.text_stream import TextStream, stop_strings
from kvist.text.gguf_tokenizer import GgufVocabulary, build
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_bytes_bpe

END, OTHER = "<|im_end|>", "<|other|>"


def byte_level() -> Tokenizer:
    backend = train_bytes_bpe("YES and NO é 🙂\n" * 4, 280)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (END, OTHER)])
    return Tokenizer(backend, eos_ids=[0])


def spaced() -> Tokenizer:
    """Characters that it lacks are bytes, one a token."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *"\u2581YES", END, OTHER]
    types = [2, 3, 3, *[6] * 256, *[1] * 4, 3, 3]
    facts = {"scores": [0.0] * len(pieces), "merges": [], "pre": "default", "bos": 1, "eos": 2, "unknown": 0}
    ends = {"adds_bos": False, "adds_eos": False, "adds_space": False}
    return Tokenizer(build(GgufVocabulary("llama", pieces, types, **facts, **ends), "test"), eos_ids=[2])


def streamed(tokenizer: Tokenizer, text: str, stops: list[str], keep: bool = False, ends: str = "") -> tuple[str, str]:
    """The text that a stream lets through, and the stop string that ended it."""
    end_ids = tokenizer.eos_ids | set(tokenizer.encode(ends, add_special=False))
    stream = TextStream(tokenizer, frozenset(end_ids), stop_strings(tokenizer, stops), keep)
    shown = ""
    for token in tokenizer.encode(text, add_special=False):
        shown += stream.push(token)
        if stream.stop is not None:
            break
    return shown + stream.finish(), stream.stop or ""


def test_a_special_tokens_text_is_a_stop_string() -> None:
    for tokenizer in (byte_level(), spaced()):
        assert streamed(tokenizer, f"YES{END}YES", [END]) == ("YES", END)
        assert streamed(tokenizer, f"YES{END}YES", [END], keep=True) == ("YES", END)
        assert streamed(tokenizer, f"YES{END}", [END], ends=END) == ("YES", END), "where it ends a text anyway, too"
        assert streamed(tokenizer, f"YES{OTHER}YES", [f"ES{OTHER}Y"]) == ("Y", f"ES{OTHER}Y")
        assert streamed(tokenizer, f"YES{OTHER}YES", [END]) == ("YESYES", "")
        assert streamed(tokenizer, f"YES{OTHER}YES", ["SY"]) == ("YE", "SY"), "one that no stop names hides nothing"
        assert streamed(tokenizer, f"YES{OTHER}", ["|"]) == ("YES", ""), "nor is a part of its name text"


def test_no_character_before_a_stop_is_lost() -> None:
    """Bytes wait for those that may follow; a special token is none of them."""
    for tokenizer in (byte_level(), spaced()):
        assert streamed(tokenizer, f"Y🙂{END}", [END]) == ("Y🙂", END)
        assert streamed(tokenizer, f"Y🙂{END}é", [f"x{END}"]) == ("Y🙂é", "")


def test_a_vocabulary_without_the_characters_of_a_stop() -> None:
    assert streamed(spaced(), "YES", ["\ud800"]) == ("YES", "")
