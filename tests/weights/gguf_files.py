"""GGUF files as others write them: through the gguf package."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def name_of(theirs: str) -> str:
    stem, _, ending = theirs.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{ending}"
    parts = stem.split(".")
    inner = ".".join(parts[3:])
    return f"blk.{parts[2]}.{_INNER[inner]}.{ending}"


def weave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The halves of each head's rows woven into each other, as the converter of llama.cpp does it."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    kinds: Kind | Mapping[str, Kind] = Kind.F32,
    tokenizer: Mapping[str, Any] | None = None,
    factors: Sequence[float] | None = None,
) -> Path:
    """`config`: Hugging Face's. `kinds`: of matrices, or by the start of a name's last part; vectors are float32."""
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    if family == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    else:
        heads = config["num_attention_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // heads
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_rope_dimension_count(dim)
        writer.add_key_length(dim)
        if config["rope_parameters"].get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope_parameters"]["factor"])
    for key, value in (tokenizer or {}).items():
        getattr(writer, f"add_{key}")(value)
    for theirs, tensor in tensors.items():
        if theirs.startswith("lm_head") and config.get("tie_word_embeddings", family == "gpt2"):
            continue
        numbers = tensor.detach().float().numpy()
        if family == "gpt2" and "transformer.h." in theirs and numbers.ndim == 2:
            numbers = numbers.T
        if family == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            numbers = weave(numbers, config["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"])
        numbers, name = np.ascontiguousarray(numbers), name_of(theirs)
        kind = kinds if isinstance(kinds, Kind) else next(k for part, k in kinds.items() if part in name)
        if numbers.ndim == 1 or kind is Kind.F32:
            writer.add_tensor(name, numbers)
        else:
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_COMMON = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "gpt_neox.embed_in": "token_embd",
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": "output",
    "lm_head": "output",
}
# What llama.cpp calls them.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "qwen3_moe": "qwen3moe",
    "phi": "phi2",
    "gpt_neox": "gptneox",
    "stablelm": "stablelm",
}


def write_family(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], kind: Kind) -> Path:
    """A checkpoint of one of `ARCHITECTURES`, as llama.cpp's converter would write it."""
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    _add_facts(writer, family, config, dim)
    experts: dict[str, dict[int, np.ndarray]] = {}
    for theirs, tensor in tensors.items():
        stem, _, ending = theirs.rpartition(".")
        if stem == "lm_head" and config["tie_word_embeddings"]:
            continue
        numbers = np.ascontiguousarray(tensor.float().numpy())
        if stem in _ENDS:
            name = _ENDS[stem]
        else:
            number, _, inner = stem.split("layers.", 1)[1].partition(".")
            if "experts" in inner:
                _, _, expert, what = inner.split(".")
                experts.setdefault(f"blk.{number}.ffn_{what.removesuffix('_proj')}_exps", {})[int(expert)] = numbers
                continue
            name = f"blk.{number}.{(_COMMON | _GEMMA if family.startswith('gemma') else _COMMON)[inner]}"
        if family.startswith("gemma") and name.endswith("norm"):
            numbers = numbers + 1
        if family == "smollm3" and name.endswith(("attn_q", "attn_k")):
            numbers = weave(numbers, heads if name.endswith("q") else config["num_key_value_heads"])
        if family == "gpt_neox" and name.endswith("attn_qkv"):
            by_head = numbers.reshape(heads, 3, dim, *numbers.shape[1:])
            numbers = by_head.swapaxes(0, 1).reshape(numbers.shape)
        add(writer, f"{name}.{ending}", np.ascontiguousarray(numbers), kind)
    if config["rope_parameters"].get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(config["rope_parameters"][f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    for name, matrices in experts.items():
        add(writer, f"{name}.weight", np.stack([matrices[expert] for expert in range(len(matrices))]), kind)
    return close(writer, path)


def _add_facts(writer: gguf.GGUFWriter, family: str, config: Mapping[str, Any], dim: int) -> None:
    """What is not said of all."""
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        original = config["original_max_position_embeddings"]
        longer = config["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)))
    writer.add_rope_dimension_count(int(dim * rope.get("partial_rotary_factor", 1.0)))
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_key_length(dim)
        writer.add_value_length(dim)
    else:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    if "use_parallel_residual" in config:
        writer.add_parallel_residual(config["use_parallel_residual"])
    if family.startswith("gemma") or family == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if family == "gemma3_text":
        writer.add_float32("gemma3.rope.freq_base_swa", ropes["sliding_attention"]["rope_theta"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if family == "qwen3_moe":
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def add(writer: gguf.GGUFWriter, name: str, numbers: np.ndarray, kind: Kind) -> None:
    """A tensor of that kind, in float32 where the converter never has another."""
    numbers = np.ascontiguousarray(numbers)
    if numbers.ndim == 1 or kind is Kind.F32 or "ffn_gate_inp" in name:
        writer.add_tensor(name, numbers)
    else:
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def close(writer: gguf.GGUFWriter, path: Path) -> Path:
    """Writes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
