"""Importer for llama2.c's legacy `.bin` checkpoints: model file and vocabulary become a checkpoint directory.

Model file: seven little-endian int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len),
then float32 arrays in the order of `_arrays`; a negative vocab_size says that an output projection of its own
ends the file. Vocabulary file: int32 length of the longest piece, then per piece a float32 score, an int32
length and the bytes. Both are untrusted: every size is checked against the length of the file before anything
is allocated.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from kvist.base.errors import KvistError, WeightsError
from kvist.base.files import atomic_folder
from kvist.weights.checkpoint import SINGLE_FILE, save

_HEADER = struct.Struct("<7i")
_PIECE = struct.Struct("<fi")
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class _Header:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.kv_heads


def convert(source: Path, out: Path) -> None:
    """Write the checkpoint directory `out` (weights, configuration, tokenizer) from a llama2.c checkpoint.

    `source` is the model file, with one `tok*.bin` beside it, or a directory with one of each. `out` must not
    exist or be empty; it appears whole or not at all. Raises `WeightsError` for anything else.
    """
    model, vocabulary = _find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} exists and is not an empty directory; choose another output directory")
    try:
        header = _read_header(model)
        pieces = _read_pieces(vocabulary, header.vocab)
        tensors = _read_tensors(model, header)
        with atomic_folder(out) as folder:
            save(folder / SINGLE_FILE, tensors)
            _write(folder / "tokenizer.json", _tokenizer(pieces).to_str(pretty=True))
            _write(folder / "config.json", json.dumps(_config(header), indent=2))
            _write(
                folder / "generation_config.json",
                json.dumps({"bos_token_id": 1, "eos_token_id": 2}, indent=2),
            )
            _write(folder / "tokenizer_config.json", json.dumps(_tokenizer_config(header), indent=2))
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot convert {source} to {out}: {error.strerror or error}") from error
    except KvistError as error:
        raise WeightsError(str(error)) from error


def _find(source: Path) -> tuple[Path, Path]:
    """The model file and the vocabulary file that `source` means."""
    if not source.exists():
        raise WeightsError(f"{source} does not exist")
    folder = source if source.is_dir() else source.parent
    vocabularies = sorted(path for path in folder.glob("tok*.bin") if path != source)
    chosen = sorted(set(folder.glob("*.bin")) - set(vocabularies)) if source.is_dir() else [source]
    for kind, pattern, found in (("model", "*.bin", chosen), ("vocabulary", "tok*.bin", vocabularies)):
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise WeightsError(f"{folder} should hold one llama2.c {kind} file ({pattern}), found {names}")
    return chosen[0], vocabularies[0]


def _read_header(path: Path) -> _Header:
    """The header of a model file whose length is exactly what the header implies."""
    size = path.stat().st_size
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size:
        raise WeightsError(f"{path} is too short for a llama2.c checkpoint: {size} bytes")
    if raw[:4] == b"24ka":
        raise WeightsError(f"{path} is a versioned llama2.c export; export it again with --version 0")
    dim, hidden, layers, heads, kv_heads, vocab, context = _HEADER.unpack(raw)
    header = _Header(dim, hidden, layers, heads, kv_heads, abs(vocab), context, tied=vocab > 0)
    if min(dim, hidden, layers, heads, kv_heads, abs(vocab), context) < 1:
        raise WeightsError(f"{path} is not a llama2.c checkpoint: its header holds {_HEADER.unpack(raw)}")
    if dim % heads or heads % kv_heads or header.head_dim % 2:
        raise WeightsError(
            f"{path}: {dim} dimensions do not divide into {heads} even-sized heads over {kv_heads} KV heads"
        )
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in _arrays(header))
    if size != expected:
        raise WeightsError(
            f"{path} has {size:,} bytes where its header implies {expected:,}: truncated, or not of llama2.c"
        )
    return header


def _arrays(header: _Header) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each array of a model file, in order; those of layers are stacked over the layers."""
    dim, hidden, kv_dim, layers = header.dim, header.hidden, header.kv_dim, header.layers
    arrays: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens", (header.vocab, dim)),
        ("input_layernorm", (layers, dim)),
        ("self_attn.q_proj", (layers, dim, dim)),
        ("self_attn.k_proj", (layers, kv_dim, dim)),
        ("self_attn.v_proj", (layers, kv_dim, dim)),
        ("self_attn.o_proj", (layers, dim, dim)),
        ("post_attention_layernorm", (layers, dim)),
        ("mlp.gate_proj", (layers, hidden, dim)),
        ("mlp.down_proj", (layers, dim, hidden)),
        ("mlp.up_proj", (layers, hidden, dim)),
        ("model.norm", (dim,)),
        ("rope_tables", (2, header.context, header.head_dim // 2)),
    ]
    return arrays if header.tied else [*arrays, ("lm_head", (header.vocab, dim))]


def _read_tensors(path: Path, header: _Header) -> dict[str, Tensor]:
    """The weights in float32 under their Hugging Face names; mapped from `path` except for q and k."""
    flat = torch.from_numpy(np.memmap(path, dtype="<f4", mode="c", offset=_HEADER.size))
    tensors: dict[str, Tensor] = {}
    offset = 0
    for name, shape in _arrays(header):
        stored = flat[offset : offset + math.prod(shape)].view(shape)
        offset += stored.numel()
        if name.startswith(("model.", "lm_head")):
            tensors[f"{name}.weight"] = stored
        elif name != "rope_tables":
            for layer in range(header.layers):
                weight = stored[layer]
                if name in ("self_attn.q_proj", "self_attn.k_proj"):
                    weight = _halves(weight, header.head_dim)
                tensors[f"model.layers.{layer}.{name}.weight"] = weight
    return tensors


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection [heads * head_dim, dim] from interleaved RoPE pairs to half-split order.

    Within a head, rows 2i and 2i+1 are rotated together in llama2.c; here rows i and i + head_dim/2 are.
    """
    rows, dim = weight.shape
    return weight.view(rows // head_dim, head_dim // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def _read_pieces(path: Path, count: int) -> list[tuple[str, float]]:
    """`count` pieces and their scores, spaces as `▁`; ids 0 to 2 are special, 3 to 258 the 256 bytes."""
    fixed = _SPECIAL + _BYTES
    size = path.stat().st_size
    if count < len(fixed):
        raise WeightsError(f"{path}: the model has {count} tokens, fewer than the {len(fixed)} that llama2.c reserves")
    if size < 4 + count * _PIECE.size:
        raise WeightsError(f"{path} has {size:,} bytes, too few for the model's {count:,} tokens")
    pieces: list[tuple[str, float]] = []
    with path.open("rb") as file:
        file.seek(4)
        remaining = size - 4
        for index in range(count):
            head = file.read(_PIECE.size)
            remaining -= _PIECE.size
            score, length = _PIECE.unpack(head) if len(head) == _PIECE.size else (math.nan, -1)
            if not (math.isfinite(score) and 0 < length <= remaining):
                raise WeightsError(f"{path} is truncated or corrupt at piece {index} of {count:,}")
            remaining -= length
            try:
                text = file.read(length).decode()
            except UnicodeDecodeError:
                raise WeightsError(f"{path}: piece {index} is not UTF-8") from None
            pieces.append((fixed[index] if index < len(_SPECIAL) else text.replace(" ", "▁"), score))
    if remaining:
        raise WeightsError(f"{path} holds more than the model's {count:,} tokens; it belongs to another model")
    texts = [text for text, _ in pieces]
    if tuple(texts[: len(fixed)]) != fixed or len(set(texts)) != count:
        raise WeightsError(f"{path} is not a llama2.c vocabulary: ids 3 to 258 are not the bytes, or a piece repeats")
    return pieces


def _tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """SentencePiece's BPE: of all adjacent pairs the one whose union scores best is merged first.

    So a merge list is every split of every piece into two pieces, in order of the union's score.
    """
    ids = {text: index for index, (text, _) in enumerate(pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text, _ in sorted(pieces[len(_SPECIAL) + len(_BYTES) :], key=lambda piece: -piece[1])
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


def _config(header: _Header) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": header.dim,
        "intermediate_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "vocab_size": header.vocab,
        "max_position_embeddings": header.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": header.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def _tokenizer_config(header: _Header) -> dict[str, Any]:
    unknown, begin, end = _SPECIAL
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.context,
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
