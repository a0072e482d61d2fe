"""Gemma 4 and DeepSeek-V2 in GGUF files: see `gguf_families`."""

from typing import Any

from kvist.base.errors import ConfigError
from kvist.models.gguf_facts import ROPE_FACTORS, Architecture, Facts, factors_of, rope_of

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA4_OUTER = _OUTER | {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_GEMMA4_BLOCK = _BLOCK | {
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_GEMMA4_NAMED = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
_DEEPSEEK_BLOCK = _BLOCK | {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_DEEPSEEK_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SOFTMAX = 1  # what turns a router's numbers into shares


def _gemma4(facts: Facts) -> dict[str, Any]:
    get, layers = facts.get, facts.layers()
    local = facts.by_layer("attention.sliding_window_pattern", bool, layers)
    if local[-1]:
        raise ConfigError(f"{facts.header.path}: a last layer with a window is not supported")
    first = layers - get("attention.shared_kv_layers", int, 0)  # of those that read another's cache
    wide = [layer for layer in range(layers) if not local[layer]]
    own = [layer for layer in wide if layer < first]
    config = {
        "model_type": "gemma4_text",
        "hidden_size": get("embedding_length", int),
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention" if own else "full_attention" for own in local],
        "num_attention_heads": get("attention.head_count", int),
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in facts.header.tensors for layer in own),
        "num_kv_shared_layers": layers - first,
        "sliding_window": get("attention.sliding_window", int),
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "final_logit_softcapping": get("final_logit_softcapping", float, None),
    }
    parts = _gemma4_heads(facts, local), _gemma4_mlp(facts, layers, first), _gemma4_rope(facts), _gemma4_each(facts)
    for part in parts:
        config |= part
    return config


def _gemma4_heads(facts: Facts, local: list[bool]) -> dict[str, Any]:
    heads = facts.by_layer("attention.head_count_kv", int, len(local))
    dim, local_dim = facts.get("attention.key_length", int), facts.get("attention.key_length_swa", int)
    facts.require("attention.value_length", dim)
    facts.require("attention.value_length_swa", local_dim)
    facts.require("rope.dimension_count", dim)
    facts.require("rope.dimension_count_swa", local_dim)
    of_local = {count for count, own in zip(heads, local, strict=True) if own}
    if len(of_local) > 1:
        raise ConfigError(f"{facts.header.path}: layers with a window have {sorted(of_local)} KV heads")
    wide = {layer: {"num_key_value_heads": heads[layer], "head_dim": dim} for layer, own in enumerate(local) if not own}
    return {
        "num_key_value_heads": of_local.pop() if of_local else heads[0],
        "head_dim": local_dim,
        "per_layer_config": {str(layer): shape for layer, shape in wide.items()},
    }


def _gemma4_mlp(facts: Facts, layers: int, first: int) -> dict[str, Any]:
    inner = facts.by_layer("feed_forward_length", int, layers)
    double = inner[-1] == 2 * inner[0]
    if inner != [inner[0] * (1 + (double and layer >= first)) for layer in range(layers)]:
        raise ConfigError(f"{facts.header.path}: MLPs of {sorted(set(inner))} numbers do not fit their layers")
    found: dict[str, Any] = {"intermediate_size": inner[0], "use_double_wide_mlp": double}
    experts = facts.get("expert_count", int, 0), facts.get("expert_used_count", int, 0)
    width = facts.get("expert_feed_forward_length", int, 0)
    if "blk.0.ffn_gate_inp.weight" not in facts.header.tensors:
        return found
    names = "num_experts", "top_k_experts", "moe_intermediate_size"
    return found | {"enable_moe_block": True} | dict(zip(names, (*experts, width), strict=True))


def _gemma4_rope(facts: Facts) -> dict[str, Any]:
    """The frequencies that do not turn are divided by so much that nothing is left of them."""
    facts.require("rope.scaling.type", "none")
    factors = factors_of(facts.header, ROPE_FACTORS)
    turning = factors.count(1.0)
    if not turning or factors != [1.0] * turning + [factors[-1]] * (len(factors) - turning):
        raise ConfigError(f"{facts.header.path}: {ROPE_FACTORS} divides frequencies in a way that is not supported")
    if turning < len(factors) and factors[-1] < 1e29:
        raise ConfigError(f"{facts.header.path}: {ROPE_FACTORS} slows frequencies, which is not supported")
    wide = {"rope_type": "proportional", "partial_rotary_factor": turning / len(factors)}
    return {
        "rope_parameters": {
            "full_attention": wide | {"rope_theta": facts.get("rope.freq_base", float)},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": facts.get("rope.freq_base_swa", float, 10_000.0),
            },
        }
    }


def _gemma4_each(facts: Facts) -> dict[str, Any]:
    embedding = facts.header.tensors.get("per_layer_token_embd.weight")
    found = {"hidden_size_per_layer_input": facts.get("embedding_length_per_layer_input", int)}
    return found if embedding is None else found | {"vocab_size_per_layer_input": embedding.shape[0]}


def _deepseek2(facts: Facts) -> dict[str, Any]:
    header, get = facts.header, facts.get
    rotary, rank = get("rope.dimension_count", int), get("attention.kv_lora_rank", int)
    ending = "_mla" if facts.has("attention.key_length_mla") else ""
    head, values = get(f"attention.key_length{ending}", int), get(f"attention.value_length{ending}", int)
    if ending:  # the other lengths are those of what is cached; older files do not say them
        facts.require("attention.key_length", rank + rotary)
        facts.require("attention.value_length", rank)
    get("attention.head_count_kv", int, None)  # 1, or that of the heads: latents are everybody's
    return {
        "model_type": "deepseek_v2",
        "hidden_size": get("embedding_length", int),
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": get("attention.head_count", int),
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in header.tensors,
        "kv_lora_rank": rank,
        "q_lora_rank": get("attention.q_lora_rank", int, None),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": head - rotary,
        "v_head_dim": values,
        "first_k_dense_replace": get("leading_dense_block_count", int, 0),
        "rope_parameters": _deepseek2_rope(facts),
    } | _deepseek2_experts(facts)


def _deepseek2_experts(facts: Facts) -> dict[str, Any]:
    """Where there are groups, experts are of the groups whose best is best: so DeepSeek-V2 has them, and how else is
    not said."""
    get = facts.get
    facts.require("expert_weights_norm", False)
    facts.require("expert_gating_func", _SOFTMAX)
    groups = get("expert_group_count", int, 1)
    return {
        "n_routed_experts": get("expert_count", int, 0),
        "num_experts_per_tok": get("expert_used_count", int, 0),
        "n_shared_experts": get("expert_shared_count", int, 0),
        "moe_intermediate_size": get("expert_feed_forward_length", int),
        "routed_scaling_factor": get("expert_weights_scale", float, 0.0) or 1.0,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": get("expert_group_used_count", int, 1),
    }


def _deepseek2_rope(facts: Facts) -> dict[str, Any]:
    if facts.get("rope.scaling.type", str, "none") != "yarn":
        return rope_of(facts)
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.attn_factor"):
        facts.require(key, 1.0)
    # A tenth of what the scores are scaled by; that of cosines and sines is the same in these models, and not stored.
    weight = round(facts.get("rope.scaling.yarn_log_multiplier", float) / 0.1, 6)
    if weight <= 0:
        raise ConfigError(f"{facts.header.path}: yarn whose yarn_log_multiplier is not positive is not supported")
    return {
        "rope_type": "yarn",
        "rope_theta": facts.get("rope.freq_base", float, 10_000.0),
        "factor": facts.get("rope.scaling.factor", float),
        "original_max_position_embeddings": facts.get("rope.scaling.original_context_length", int),
        "beta_fast": facts.get("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": facts.get("rope.scaling.yarn_beta_slow", float, 1.0),
        "mscale": weight,
        "mscale_all_dim": weight,
    }


GEMMA4 = Architecture(_gemma4, _GEMMA4_BLOCK, _GEMMA4_OUTER, named=_GEMMA4_NAMED)
DEEPSEEK2 = Architecture(
    _deepseek2,
    _DEEPSEEK_BLOCK,
    _OUTER,
    experts=_DEEPSEEK_EXPERTS,
    split=("attn_k_b", "attn_v_b", "self_attn.kv_b_proj"),
)
