"""GGUF files of Gemma 4 and DeepSeek-V2 as llama.cpp's converter would write them, by names of the gguf package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH
from gguf import GGMLQuantizationType as Kind
from gguf_files import add, close


def write_gemma4(path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], kind: Kind) -> Path:
    writer, local = _writer(path, "gemma4", config), [name == "sliding_attention" for name in config["layer_types"]]
    shared, inner = config.get("num_kv_shared_layers", 0), config["intermediate_size"]
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(local)
    for length in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        length(config["global_head_dim"])
    for length in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        length(config["head_dim"])
    own = len(local) - shared
    double = config.get("use_double_wide_mlp", False)
    writer.add_feed_forward_length([inner * (1 + (layer >= own)) for layer in range(len(local))] if double else inner)
    heads, wide = config["num_key_value_heads"], config.get("num_global_key_value_heads")
    writer.add_head_count_kv(heads if wide is None else [heads if one else wide for one in local])
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if "final_logit_softcapping" in config:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("enable_moe_block"):
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["top_k_experts"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    names = gguf.get_tensor_name_map(MODEL_ARCH.GEMMA4, len(local))
    for theirs, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if theirs.endswith(("router.scale", "per_expert_scale")):
            block = f"blk.{theirs.split('.')[2]}"
            name = f"{block}.{'ffn_gate_inp' if theirs.endswith('router.scale') else 'ffn_down_exps'}.scale"
        else:
            named = theirs if theirs.endswith(".weight") else f"{theirs}.weight"
            name = names.get_name(named, try_suffixes=(".weight",))
        add(writer, name, numbers, kind)
    half = config["global_head_dim"] // 2
    turning = int(half * ropes["full_attention"]["partial_rotary_factor"])
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turning + [1e30] * (half - turning), np.float32))
    return close(writer, path)


def write_deepseek2(
    path: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], kind: Kind, older: bool = False
) -> Path:
    """`older`: keys and values of a head are made by one matrix."""
    writer, ropes, layers = _writer(path, "deepseek2", config), config["rope_parameters"], config["num_hidden_layers"]
    rank, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    head, values = config["qk_nope_head_dim"] + rotary, config["v_head_dim"]
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count_kv(config["num_attention_heads"] if older else 1)
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 0))
    writer.add_vocab_size(config["vocab_size"])
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(head if older else rank + rotary)
    writer.add_value_length(values if older else rank)
    if not older:
        writer.add_key_length_mla(head)
        writer.add_value_length_mla(values)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config.get("routed_scaling_factor", 1.0))
    if "n_group" in config:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    writer.add_rope_dimension_count(rotary)
    writer.add_rope_freq_base(ropes["rope_theta"])
    if ropes["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(ropes["factor"])
        writer.add_rope_scaling_orig_ctx_len(ropes["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(ropes["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(ropes["beta_slow"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * ropes["mscale_all_dim"])
    names, experts = gguf.get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, layers), dict[str, dict[int, np.ndarray]]()
    for theirs, tensor in tensors.items():
        numbers = tensor.float().numpy()
        if ".experts." in theirs:
            before, _, rest = theirs.partition(".experts.")
            expert, _, what = rest.partition(".")
            experts.setdefault(f"{before}.experts.{what}", {})[int(expert)] = numbers
        elif theirs.endswith("kv_b_proj.weight") and not older:
            keys, values_of = np.split(numbers.reshape(-1, head - rotary + values, rank), [head - rotary], axis=1)
            stem = theirs.removesuffix("kv_b_proj.weight")
            for name, part in (("k_b_proj", keys.swapaxes(1, 2)), ("v_b_proj", values_of)):
                add(writer, names.get_name(f"{stem}{name}.weight", try_suffixes=(".weight",)), part, kind)
        else:
            add(writer, names.get_name(theirs, try_suffixes=(".weight", ".bias")), numbers, kind)
    for theirs, matrices in experts.items():
        stacked = np.stack([matrices[expert] for expert in range(len(matrices))])
        add(writer, names.get_name(theirs, try_suffixes=(".weight",)), stacked, kind)
    return close(writer, path)


WRITERS = {"gemma4_text": write_gemma4, "deepseek_v2": write_deepseek2}


def _writer(path: Path, architecture: str, config: Mapping[str, Any]) -> gguf.GGUFWriter:
    """With what is said in the same way of both."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    return writer
