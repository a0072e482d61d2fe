"""What GGUF's architectures are called in the terms of Hugging Face: readers of their metadata, and names of tensors.

Names and order of the numbers are those of llama.cpp's converter from Hugging Face's checkpoints."""

from collections.abc import Callable
from typing import Any

from kvist.base.errors import ConfigError, WeightsError
from kvist.models.gguf_facts import Architecture, Facts, rope_of
from kvist.models.gguf_newer import DEEPSEEK2, GEMMA4

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


def _llama_like(model_type: str, rotated: int | None = None) -> Callable[[Facts], dict[str, Any]]:
    def read(facts: Facts) -> dict[str, Any]:
        header, get = facts.header, facts.get
        hidden, heads = get("embedding_length", int), get("attention.head_count", int)
        if heads < 1:
            raise WeightsError(f"{header.path}: {header.architecture}.attention.head_count should be positive")
        dim = get("attention.key_length", int, hidden // heads)
        for key, expected in {"attention.value_length": dim, "rope.dimension_count": rotated or dim}.items():
            if get(key, int, expected) != expected:
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
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float, 1e-6),
            "rope_parameters": rope_of(facts),
        }
        if model_type == "llama":
            if window := get("attention.sliding_window", int, 0):
                return config | {"model_type": "mistral", "sliding_window": window}
            config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        return config

    return read


def _gpt2(facts: Facts) -> dict[str, Any]:
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


_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK = _LLAMA_BLOCK | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_PHI2_BLOCK = _LLAMA_BLOCK | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
_NEOX_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_NEOX_OUTER = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_MOE_BLOCK = _LLAMA_BLOCK | {"ffn_gate_inp": "mlp.gate"}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


def _gemma(model_type: str, largest: int) -> Callable[[Facts], dict[str, Any]]:
    """`largest`: layers of the one whose scores are scaled by the model's width, and not by a head's."""

    def read(facts: Facts) -> dict[str, Any]:
        caps = {name: facts.get(name, float, None) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
        window, local = facts.get("attention.sliding_window", int), facts.get("rope.freq_base_swa", float, 10_000.0)
        facts.get("attention.sliding_window_pattern", int, None)
        config = _llama_like(model_type)(facts)
        rope = config.pop("rope_parameters")
        heads, dim = config["num_attention_heads"], config["head_dim"]
        width = config["hidden_size"] // heads if config["num_hidden_layers"] == largest else dim
        if model_type == "gemma3_text":
            both = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
            config["rope_parameters"] = both
        else:
            config["rope_parameters"] = rope
        return config | caps | {"sliding_window": window, "query_pre_attn_scalar": width}

    return read


def _phi3(facts: Facts) -> dict[str, Any]:
    window = facts.get("attention.sliding_window", int, None)
    return _partly_rotated(facts, "phi3") | {"sliding_window": window or None}


def _smollm3(facts: Facts) -> dict[str, Any]:
    return _llama_like("smollm3")(facts) | {"no_rope_layer_interval": 4, "use_sliding_window": False}


def _qwen3_moe(facts: Facts) -> dict[str, Any]:
    experts = {
        "num_experts": facts.get("expert_count", int),
        "num_experts_per_tok": facts.get("expert_used_count", int),
        "moe_intermediate_size": facts.get("expert_feed_forward_length", int),
        "norm_topk_prob": True,
    }
    return _llama_like("qwen3_moe")(facts) | experts


def _with_layer_norm(model_type: str) -> Callable[[Facts], dict[str, Any]]:
    def read(facts: Facts) -> dict[str, Any]:
        epsilon, parallel = (
            facts.get("attention.layer_norm_epsilon", float),
            facts.get("use_parallel_residual", bool, None),
        )
        config = _partly_rotated(facts, model_type)
        del config["head_dim"]
        config.pop("rms_norm_eps")
        config["layer_norm_eps"] = epsilon
        if model_type == "gpt_neox":
            del config["num_key_value_heads"]
            config["attention_bias"] = "blk.0.attn_qkv.bias" in facts.header.tensors
        if model_type == "stablelm":
            config["use_qkv_bias"] = "blk.0.attn_q.bias" in facts.header.tensors
        return config if parallel is None else config | {"use_parallel_residual": parallel}

    return read


def _partly_rotated(facts: Facts, model_type: str) -> dict[str, Any]:
    rotated, dim = facts.get("rope.dimension_count", int), facts.get("attention.key_length", int, None)
    dim = dim or facts.get("embedding_length", int) // max(facts.get("attention.head_count", int), 1)
    config = _llama_like(model_type, rotated)(facts)
    if not 0 < rotated <= dim:
        raise ConfigError(f"{facts.header.path}: {rotated} of a head's {dim} dimensions cannot be rotated")
    config["rope_parameters"]["partial_rotary_factor"] = rotated / dim
    return config


ARCHITECTURES = {
    "llama": Architecture(_llama_like("llama"), _LLAMA_BLOCK, _LLAMA_OUTER, woven=True),
    "qwen2": Architecture(_llama_like("qwen2"), _LLAMA_BLOCK, _LLAMA_OUTER),
    "qwen3": Architecture(_llama_like("qwen3"), _LLAMA_BLOCK, _LLAMA_OUTER),
    "qwen3moe": Architecture(_qwen3_moe, _MOE_BLOCK, _LLAMA_OUTER, experts=_EXPERTS),
    "smollm3": Architecture(_smollm3, _LLAMA_BLOCK, _LLAMA_OUTER, woven=True),
    "phi3": Architecture(_phi3, _PHI3_BLOCK, _LLAMA_OUTER),
    "phi2": Architecture(_with_layer_norm("phi"), _PHI2_BLOCK, _LLAMA_OUTER | {"output_norm": "model.final_layernorm"}),
    "gptneox": Architecture(_with_layer_norm("gpt_neox"), _NEOX_BLOCK, _NEOX_OUTER, "gpt_neox.layers.{}."),
    "stablelm": Architecture(_with_layer_norm("stablelm"), _LLAMA_BLOCK, _LLAMA_OUTER),
    "gemma2": Architecture(_gemma("gemma2", 46), _GEMMA_BLOCK, _LLAMA_OUTER, added={"norm.weight": 1.0}),
    "gemma3": Architecture(_gemma("gemma3_text", 62), _GEMMA_BLOCK, _LLAMA_OUTER, added={"norm.weight": 1.0}),
    "gemma4": GEMMA4,
    "deepseek2": DEEPSEEK2,
    "gpt2": Architecture(
        _gpt2,
        _GPT2_BLOCK,
        _GPT2_OUTER,
        "transformer.h.{}.",
        turned=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
}
