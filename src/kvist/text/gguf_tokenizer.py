"""A tokenizer from what a GGUF file says of it: byte-level BPE with merges, SentencePiece's BPE with scores, or Gemma
4's with merges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from kvist.base.errors import TextError

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6  # kinds of tokens
# Tokens that end a turn or a text whatever else a file says, by how the families spell them. Files do not always name
# all of theirs, and some say of these that they are plain text.
TURN_ENDS = frozenset(
    """
    <|im_end|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|endoftext|> <end_of_turn> <eos> <turn|>
    <｜end▁of▁sentence｜> <|end▁of▁sentence|> <|return|> <|call|> <|calls|> <|flush|> <EOT> ▁<EOT> _<EOT> [EOT] [EOS]
    <end_of_utterance> <|END_OF_TURN_TOKEN|> <|tool_response>
    """.split()
)
# Where there are calls of their own, a message within an answer ends on this one, and the answer goes on.
_END, _CALLS = "<|end|>", (frozenset({"<|return|>", "<|call|>"}), frozenset({"<|calls|>", "<|flush|>"}))
# Of the tokens of Phi-3 these alone leave the white space behind them as it is.
_KEEP_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_SPACE = "\u2581"
# How a text is cut before its bytes are merged, by GGUF's names: the patterns of the models' own tokenizers.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
# DeepSeek-V2's cuts, one after the other: lines, letters that have cases, punctuation, spaces at the end, Chinese and
# Korean, digits.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-"
    "ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-"
    "ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "roberta-bpe", "default"})
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
_MOST_TOKENS = 1 << 20
_MOST_CHARACTERS = 1024  # of a token; where merges are found by cutting it, that takes time by its square
_MOST_IN_ALL = 1 << 24


@dataclass(frozen=True)
class GgufVocabulary:
    """`kind`: "gpt2", "gemma4" (merges) or "llama" (scores). `types`: of each token. `pre`: how a text is cut first.
    `strips`: special tokens take the white space behind them, as those of Phi-3 do."""

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    pre: str
    bos: int | None
    eos: int | None
    unknown: int | None
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    strips: bool = False


def turn_ends(tokens: Sequence[str]) -> dict[str, int]:
    """The tokens that end a turn or a text by their text alone, and their ids."""
    found = {token: index for index, token in enumerate(tokens) if token in TURN_ENDS}
    if any(calls <= found.keys() for calls in _CALLS):
        found.pop(_END, None)
    return found


def build(vocabulary: GgufVocabulary, where: str) -> tokenizers.Tokenizer:
    """Raises `TextError` naming `where` for a vocabulary that makes no tokenizer."""
    tokens, types = vocabulary.tokens, vocabulary.types or [1] * len(vocabulary.tokens)
    if not tokens or len(tokens) > _MOST_TOKENS or len(types) != len(tokens):
        raise TextError(f"{where}: {len(tokens):,} tokens with {len(types):,} types make no vocabulary")
    if (longest := max(map(len, tokens))) > _MOST_CHARACTERS or sum(map(len, tokens)) > _MOST_IN_ALL:
        raise TextError(
            f"{where}: a token has at most {_MOST_CHARACTERS:,} characters, and all of them {_MOST_IN_ALL:,}; the "
            f"longest has {longest:,}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise TextError(f"{where}: {len(tokens) - len(ids):,} tokens of the vocabulary stand there twice")
    for name, index in (("bos", vocabulary.bos), ("eos", vocabulary.eos), ("unknown", vocabulary.unknown)):
        if index is not None and not 0 <= index < len(tokens):
            raise TextError(f"{where}: the {name} token is {index}, of {len(tokens):,}")
    if vocabulary.kind == "gpt2":
        backend = _byte_level(vocabulary, ids, where)
    elif vocabulary.kind == "llama":
        backend = _spaced(vocabulary, ids, _scored(vocabulary, ids, where))
    elif vocabulary.kind == "gemma4":
        backend = _spaced(vocabulary, ids, _merges(vocabulary, ids, where))
    else:
        known = "gpt2, llama and gemma4"
        raise TextError(f"{where}: a tokenizer of kind {vocabulary.kind!r:.80} is not supported ({known} are)")
    ends = turn_ends(tokens)
    for token, kind in zip(tokens, types, strict=True):
        special = kind in (_CONTROL, _UNKNOWN) or token in ends
        if special or kind == _USER:
            strips = vocabulary.strips and token not in _KEEP_SPACE
            added = AddedToken(token, rstrip=strips, normalized=False, special=special)
            (backend.add_special_tokens if special else backend.add_tokens)([added])
    _add_ends(backend, vocabulary)
    return backend


def _merges(vocabulary: GgufVocabulary, ids: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Those of the file, in its order."""
    merges = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise TextError(f"{where}: the merge {merge!r:.80} is of tokens that are not in the vocabulary")
        merges.append((left, right))
    return merges


def _byte_level(vocabulary: GgufVocabulary, ids: Mapping[str, int], where: str) -> tokenizers.Tokenizer:
    pre, merges = vocabulary.pre, _merges(vocabulary, ids, where)
    backend = tokenizers.Tokenizer(models.BPE(dict(ids), merges, ignore_merges=_PATTERNS.get(pre) == _LLAMA3))
    if pre in _PATTERNS:
        cut = pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
        if _PATTERNS[pre] == _QWEN2:
            backend.normalizer = normalizers.NFC()
    elif pre == "deepseek-llm":
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _DEEPSEEK]
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    elif pre in _SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre in _GPT2:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        known = ", ".join(sorted({*_PATTERNS, *_SINGLE_DIGITS, *_GPT2, "deepseek-llm"}))
        raise TextError(f"{where}: how {pre!r:.80} cuts a text is not known here ({known} are)")
    backend.decoder = decoders.ByteLevel()
    return backend


def _scored(vocabulary: GgufVocabulary, ids: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """Pairs are merged in the order of the scores of what they make."""
    if len(vocabulary.scores) != len(ids):
        raise TextError(f"{where}: {len(vocabulary.scores):,} scores for {len(ids):,} tokens")
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-vocabulary.scores[index], ids[left], ids[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _spaced(vocabulary: GgufVocabulary, ids: Mapping[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Over characters, spaces written as others and cut nowhere; bytes stand for characters that there are not."""
    unknown = None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown]
    backend = tokenizers.Tokenizer(models.BPE(dict(ids), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = [normalizers.Prepend(_SPACE)] if vocabulary.adds_space else []
    backend.normalizer = normalizers.Sequence([*spaced, normalizers.Replace(" ", _SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if vocabulary.adds_space else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _add_ends(backend: tokenizers.Tokenizer, vocabulary: GgufVocabulary) -> None:
    before = vocabulary.bos if vocabulary.adds_bos else None
    behind = vocabulary.eos if vocabulary.adds_eos else None
    ends = [(vocabulary.tokens[index], index) for index in (before, behind) if index is not None]
    if not ends:
        return
    parts = [vocabulary.tokens[before]] if before is not None else []
    parts += ["$A"] + ([vocabulary.tokens[behind]] if behind is not None else [])
    template = processors.TemplateProcessing(single=parts, pair=[*parts, "$B"], special_tokens=ends)
    byte_level = [processors.ByteLevel(trim_offsets=False)] if vocabulary.kind == "gpt2" else []
    backend.post_processor = processors.Sequence([*byte_level, template])
