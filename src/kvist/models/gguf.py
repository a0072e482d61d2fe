"""GGUF's architectures in the terms of Hugging Face: a `config.json` from a file's metadata, and its tensors' names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvist.base.errors import ConfigError, WeightsError
from kvist.models.config import ModelConfig
from kvist.weights.gguf import Kind, Part
from kvist.weights.gguf_header import GgufHeader

_BLOCK = "model.layers.{}."
_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Architecture:
    """`config`: what the metadata says, in Hugging Face's keys. `block`, `outer`: names of tensors, theirs to ours.
    `woven`: q and k have their rotated halves woven into each other. `turned`: linear weights that the checkpoints of
    Hugging Face store as [in, out]."""

    config: Callable[["_Facts"], dict[str, Any]]
    block: Mapping[str, str]
    outer: Mapping[str, str]
    prefix: str = _BLOCK
    woven: bool = False
    turned: frozenset[str] = frozenset()

    def woven_heads(self, theirs: str, config: ModelConfig) -> int | None:
        """Into how many heads the rows of a block's tensor are woven; None where they are not."""
        return {"attn_q": config.heads, "attn_k": config.kv_heads}.get(theirs) if self.woven else None


def config_of(header: GgufHeader) -> dict[str, Any]:
    """What would stand in the model's `config.json`. Raises `ConfigError` for an architecture that is not known,
    `WeightsError` for keys that are missing."""
    architecture = _architecture(header)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{header.path}: there is no tensor 'token_embd.weight' of two dimensions")
    tied, facts = "output.weight" not in header.tensors, _Facts(header)
    config = architecture.config(facts)
    facts.finish()
    return config | {"vocab_size": embedding.shape[0], "tie_word_embeddings": tied}


def parts_of(header: GgufHeader, config: ModelConfig) -> dict[str, Part]:
    """The file's tensors under the names of Hugging Face. Raises `WeightsError` for one that has no place there."""
    architecture, parts = _architecture(header), dict[str, Part]()
    for name, tensor in header.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        stem, _, ending = name.rpartition(".")
        first, _, rest = stem.partition(".")
        number, _, inner = rest.partition(".")
        if stem in architecture.outer:
            theirs, where = stem, architecture.outer[stem]
        elif first == "blk" and number.isdecimal() and inner in architecture.block:
            theirs, where = inner, architecture.prefix.format(int(number)) + architecture.block[inner]
        else:
            raise WeightsError(
                f"{header.path}: tensor {name!r} has no place in the architecture {header.architecture!r}"
            )
        heads = architecture.woven_heads(theirs, config)
        turned = theirs in architecture.turned and ending == "weight"
        parts[f"{where}.{ending}"] = Part(tensor, heads, turned)
    return parts


def file_name(architecture: str, name: str, config: ModelConfig) -> tuple[str, int | None]:
    """The other way: what a tensor of Hugging Face is called in files of an architecture, and how many heads its rows
    are woven into there, if any."""
    known, (stem, _, ending) = _ARCHITECTURES[architecture], name.rpartition(".")
    if found := next((theirs for theirs, ours in known.outer.items() if ours == stem), None):
        return f"{found}.{ending}", None
    number, _, inner = stem.removeprefix(known.prefix.partition("{")[0]).partition(".")
    theirs = next(theirs for theirs, ours in known.block.items() if ours == inner)
    return f"blk.{number}.{theirs}.{ending}", known.woven_heads(theirs, config)


def _architecture(header: GgufHeader) -> _Architecture:
    found = _ARCHITECTURES.get(header.architecture)
    if found is None:
        known = ", ".join(_ARCHITECTURES)
        raise ConfigError(f"{header.path}: architecture {header.architecture!r} is not supported ({known} are)")
    return found


# What changes nothing, or says again what the tensors say.
_INERT = frozenset(
    {
        "attention.layer_norm_epsilon",
        "expert_count",
        "expert_used_count",
        "rope.scaling.finetuned",
        "rope.scaling.orig_ctx_len",
        "rope.scaling.original_context_length",
        "tensor_data_layout",
        "vocab_size",
    }
)


class _Facts:
    """The metadata of the file's architecture, key by key. What nobody asked for may change the mathematics."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._prefix = f"{header.architecture}."
        self._rest = {key.removeprefix(self._prefix) for key in header.metadata if key.startswith(self._prefix)}

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """See `GgufHeader.get`; without the architecture's name before the key."""
        self._rest.discard(key)
        return self.header.get(self._prefix + key, kind, default)

    def finish(self) -> None:
        """Raises `ConfigError` for keys that were not asked for and are not known to change nothing."""
        zero = {key for key in self._rest if self.header.metadata[self._prefix + key] in (0, False, "")}
        if unknown := sorted(self._rest - _INERT - zero):
            raise ConfigError(
                f"{self.header.path}: {', '.join(self._prefix + key for key in unknown)} may change the mathematics "
                "and is not supported"
            )


def _llama_like(model_type: str) -> Callable[[_Facts], dict[str, Any]]:
    def read(facts: _Facts) -> dict[str, Any]:
        header, get = facts.header, facts.get
        hidden, heads = get("embedding_length", int), get("attention.head_count", int)
        if heads < 1:
            raise WeightsError(f"{header.path}: {header.architecture}.attention.head_count should be positive")
        dim = get("attention.key_length", int, hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if get(key, int, dim) != dim:
                raise ConfigError(f"{header.path}: {header.architecture}.{key} differs from the head's {dim}")
        config = {
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length", int),
            "num_hidden_layers": get("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", int, heads),
            "head_dim": dim,
            "max_position_embeddings": get("context_length", int),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
            "rope_parameters": _rope(facts),
        }
        if model_type == "llama":
            if window := get("attention.sliding_window", int, 0):
                return config | {"model_type": "mistral", "sliding_window": window}
            config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        return config

    return read


def _rope(facts: _Facts) -> dict[str, Any]:
    header, theta = facts.header, facts.get("rope.freq_base", float, 10_000.0)
    kind, factor = facts.get("rope.scaling.type", str, "none"), facts.get("rope.scaling.factor", float, None)
    factors = header.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        if factors.kind is not Kind.F32 or len(factors.shape) != 1 or factors.nbytes > 1 << 16:
            raise WeightsError(f"{header.path}: tensor {_ROPE_FACTORS!r} should be a short list of float32")
        with header.path.open("rb") as file:
            file.seek(factors.start)
            divisors = np.frombuffer(file.read(factors.nbytes), np.float32)
        return {"rope_type": "divided", "rope_theta": theta, "divisors": [float(number) for number in divisors]}
    if kind == "linear":
        if factor is None:
            raise WeightsError(f"{header.path}: the key '{header.architecture}.rope.scaling.factor' is missing")
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind != "none":
        raise ConfigError(f"{header.path}: RoPE scaling {kind!r} is not supported (none and linear are)")
    return {"rope_type": "default", "rope_theta": theta}


def _gpt2(facts: _Facts) -> dict[str, Any]:
    hidden = facts.get("embedding_length", int)
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": facts.get("attention.head_count", int),
        "n_layer": facts.get("block_count", int),
        "n_inner": facts.get("feed_forward_length", int, 4 * hidden),
        "n_positions": facts.get("context_length", int),
        "layer_norm_epsilon": facts.get("attention.layer_norm_epsilon", float),
    }


_ARCHITECTURES = {
    "llama": _Architecture(_llama_like("llama"), _LLAMA_BLOCK, _LLAMA_OUTER, woven=True),
    "qwen2": _Architecture(_llama_like("qwen2"), _LLAMA_BLOCK, _LLAMA_OUTER),
    "qwen3": _Architecture(_llama_like("qwen3"), _LLAMA_BLOCK, _LLAMA_OUTER),
    "gpt2": _Architecture(
        _gpt2,
        _GPT2_BLOCK,
        _GPT2_OUTER,
        "transformer.h.{}.",
        turned=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
