"""A GGUF file as a model: its weights stay where they are; what else a checkpoint has is written into a folder of the
cache, once, so that everybody finds config, tokenizer and chat template where a directory of Hugging Face has them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import TextError, WeightsError
from kvist.base.files import atomic_folder, writable_cache_folder
from kvist.models.config import ModelConfig
from kvist.models.decoder import Slot
from kvist.models.families import load_config
from kvist.models.gguf import config_of, parts_of
from kvist.models.linear import Grouping, uniform
from kvist.text.chat import NAMED_TEMPLATES
from kvist.text.gguf_tokenizer import GgufVocabulary, build, turn_ends
from kvist.text.tokenizer import TOKENIZER
from kvist.weights.checkpoint import Stamp, settled_stamp
from kvist.weights.gguf import GROUPS, GgufCheckpoint
from kvist.weights.gguf_header import GgufHeader, read_header

_VERSION = 3  # raised whenever the same file would give another folder
_CONFIG = "config.json"
_NO_TOKENIZER = frozenset({"none", "no_vocab"})
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
# What a file proposes of sampling, in the terms of generation_config.json.
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class GgufModel:
    """`directory`: where config, tokenizer and chat template lie. `stamp`: of the file."""

    directory: Path
    config: ModelConfig
    checkpoint: GgufCheckpoint
    stamp: Stamp

    def grouping(self, slots: Sequence[Slot]) -> Grouping | None:
        """How the matrices of its decoder, which has these slots, are packed where nothing else is asked for: Q8_0 and
        Q4_0 in their own groups, what else is quantized in 8 bits. None where nothing is quantized."""
        checkpoint, found = self.checkpoint, dict[str, set[tuple[int, int] | None]]()
        if not checkpoint.is_quantized:
            return None
        for slot in slots:
            if slot.name in checkpoint.names():
                kinds = checkpoint.kinds(slot.name)
                found.setdefault(slot.parameter, set()).update(GROUPS.get(kind) for kind in kinds)
        own = {name: group for name, groups in found.items() if len(groups) == 1 for group in groups}
        others = uniform(8)
        return lambda name, columns: own.get(name) or others(name, columns)


def open_gguf(path: Path) -> GgufModel:
    """Raises `WeightsError`, `ConfigError` or `TextError` for a file that is damaged or not supported."""
    stamp, lasting = settled_stamp(path)
    header = read_header(path)
    key = hashlib.sha256(json.dumps([_VERSION, str(path.resolve()), stamp]).encode()).hexdigest()[:32]
    directory = writable_cache_folder() / "gguf" / key / path.stem
    if not lasting or not (directory / _CONFIG).is_file():
        with atomic_folder(directory) as folder:
            _write(header, folder)
    config = load_config(directory)
    return GgufModel(directory, config, GgufCheckpoint(header, parts_of(header, config)), stamp)


def _write(header: GgufHeader, folder: Path) -> None:
    config = config_of(header)
    if header.get("tokenizer.ggml.model", str, "none") not in _NO_TOKENIZER:
        vocabulary = _vocabulary(header)
        if len(vocabulary.tokens) > config["vocab_size"]:
            raise WeightsError(
                f"{header.path}: the tokenizer has {len(vocabulary.tokens):,} tokens and the model "
                f"{config['vocab_size']:,}: they do not belong together"
            )
        build(vocabulary, str(header.path)).save(str(folder / TOKENIZER))
        named = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos}
        settings = {name: vocabulary.tokens[index] for name, index in named.items() if index is not None}
        _write_templates(header, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config["eos_token_id"] = _ends(header, vocabulary)
    keys = {f"general.sampling.{theirs}": ours for theirs, ours in _SAMPLING.items()}
    if sampling := {ours: header.metadata[key] for key, ours in keys.items() if key in header.metadata}:
        (folder / "generation_config.json").write_text(json.dumps(sampling))
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _ends(header: GgufHeader, vocabulary: GgufVocabulary) -> list[int]:
    """The ids that end an answer: those that the file names, and those that are known by their text."""
    found = set(turn_ends(vocabulary.tokens).values())
    for name in ("eos", "eot", "eom"):
        index = header.get(f"tokenizer.ggml.{name}_token_id", int, None)
        if index is not None and not 0 <= index < len(vocabulary.tokens):
            raise TextError(f"{header.path}: the {name} token is {index}, of {len(vocabulary.tokens):,}")
        found |= set() if index is None else {index}
    return sorted(found)


def _write_templates(header: GgufHeader, folder: Path) -> None:
    """The chat template, and those that go by a name beside it, as tool_use."""
    names = header.texts(_TEMPLATES) if _TEMPLATES in header.metadata else []
    prefix = f"{_TEMPLATE}."
    names += [key.removeprefix(prefix) for key in header.metadata if key.startswith(prefix)]
    found = {name: header.get(prefix + name, str, "") for name in names}
    default = header.get(_TEMPLATE, str, "") or found.pop("default", "")
    for name, template in found.items():
        if template and re.fullmatch(r"\w{1,64}", name):  # it becomes a file's name
            (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
            (folder / NAMED_TEMPLATES / f"{name}.jinja").write_text(template, "utf-8")
    if default:
        (folder / "chat_template.jinja").write_text(default, "utf-8")


def _vocabulary(header: GgufHeader) -> GgufVocabulary:
    def get(key: str, kind: type, default: Any) -> Any:
        return header.get(f"tokenizer.ggml.{key}", kind, default)

    def listed(key: str, kind: type) -> list[Any]:
        name = f"tokenizer.ggml.{key}"
        return header.numbers(name, kind) if name in header.metadata else []

    kind, pre = get("model", str, ""), get("pre", str, "default")
    # llama.cpp adds Gemma 4's first token whatever a file says.
    bos = kind in ("llama", "gemma4") or pre in ("llama-bpe", "llama3", "llama-v3")
    return GgufVocabulary(
        kind=kind,
        tokens=header.texts("tokenizer.ggml.tokens"),
        types=listed("token_type", int),
        scores=listed("scores", float),
        merges=header.texts("tokenizer.ggml.merges") if "tokenizer.ggml.merges" in header.metadata else [],
        pre=pre,
        bos=get("bos_token_id", int, None),
        eos=get("eos_token_id", int, None),
        unknown=get("unknown_token_id", int, None),
        adds_bos=get("add_bos_token", bool, bos) or kind == "gemma4",
        adds_eos=get("add_eos_token", bool, False),
        adds_space=get("add_space_prefix", bool, kind != "gemma4"),
        strips=kind == "llama" and any(_is_phi3(header, key) for key in ("general.name", "general.basename")),
    )


def _is_phi3(header: GgufHeader, key: str) -> bool:
    """By its name, which is all that tells: its special tokens take the white space behind them, and no key says so."""
    return re.search(r"phi[ _-]?3", header.get(key, str, ""), re.IGNORECASE) is not None
