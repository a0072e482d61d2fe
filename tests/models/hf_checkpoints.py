"""Small random models of transformers, written to disk by it: the oracle of every decoder."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 99
_SMALL = {
    "vocab_size": VOCAB,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_GEMMA4 = _SMALL | {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 20,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": None,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# The longer lengths are those of the long factors throughout, since transformers computes a text at once here.
_PHI3_LONG = _SMALL | {
    "model_type": "phi3",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.125, 1.25, 1.5, 1.75, 2.0, 2.25, 3.0],
        "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0],
    },
}
_DEEPSEEK = _SMALL | {
    "model_type": "deepseek_v2",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "pad_token_id": None,
}

# What each case is there for: grouped heads throughout; head sizes 8, 48, 64, 80, 128; biases; tied or not; RoPE
# scaling; both GELUs.
CASES: dict[str, dict[str, object]] = {
    "llama-8-scaled": _SMALL
    | {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rope_parameters": _LLAMA3,
    },
    "llama-48-biased": _SMALL
    | {
        "model_type": "llama",
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "mistral-128": _SMALL
    | {
        "model_type": "mistral",
        "hidden_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "sliding_window": None,
    },
    "mistral-window": _SMALL
    | {
        "model_type": "mistral",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 20,
    },
    "qwen2-windows": _SMALL
    | {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 70,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen2-64": _SMALL
    | {
        "model_type": "qwen2",
        "hidden_size": 192,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "qwen3-80": _SMALL
    | {
        "model_type": "qwen3",
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "attention_bias": True,
    },
    "phi3-partial": _SMALL
    | {
        "model_type": "phi3",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 40,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "phi3-long": _PHI3_LONG | {"original_max_position_embeddings": 16},
    "phi3-short": _PHI3_LONG | {"original_max_position_embeddings": 512},
    "smollm3": _SMALL
    | {
        "model_type": "smollm3",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "no_rope_layer_interval": 2,
        "pad_token_id": None,
    },
    "neox": _SMALL | {"model_type": "gpt_neox", "hidden_size": 128, "num_attention_heads": 4, "pad_token_id": None},
    "neox-serial": _SMALL
    | {
        "model_type": "gpt_neox",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    },
    "phi2": _SMALL
    | {
        "model_type": "phi",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "stablelm": _SMALL
    | {
        "model_type": "stablelm",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_layernorm": True,
        "use_qkv_bias": True,
        "pad_token_id": None,
    },
    "stablelm-parallel": _SMALL
    | {
        "model_type": "stablelm",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "use_parallel_residual": True,
        "pad_token_id": None,
    },
    "qwen3-moe": _SMALL
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "pad_token_id": None,
    },
    "gemma2": _SMALL
    | {
        "model_type": "gemma2",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 40,
        "sliding_window": 20,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "pad_token_id": None,
    },
    "gemma3": _SMALL
    | {
        "model_type": "gemma3_text",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 20,
        "pad_token_id": None,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "gemma4-small": _GEMMA4
    | {
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 4.0,
    },
    "gemma4-large": _GEMMA4
    | {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4-shared-tied": _GEMMA4
    | {
        "hidden_size_per_layer_input": 8,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
    },
    "deepseek": _DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek-large": _DEEPSEEK
    | {
        "q_lora_rank": 48,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.9,
        },
    },
    "gpt2-8": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_head": 8,
        "n_layer": 3,
        "n_positions": 128,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt2-64-exact-gelu": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 128,
        "n_head": 2,
        "n_layer": 2,
        "n_positions": 128,
        "n_inner": 172,
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}


@dataclass(frozen=True)
class Written:
    """A model of transformers, in float32, and the directory that it was saved to."""

    model: PreTrainedModel
    directory: Path

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """`[len(tokens), vocab]`, without a cache."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]


def write_checkpoint(case: str, directory: Path, seed: int) -> Written:
    """A model of that case with weights from `seed`, saved by transformers."""
    raw = copy.deepcopy(CASES[case])  # transformers writes into what is in it
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Vectors are biases, zero at first, or norms, one at first: each needs a value that is missed.
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        parameter.data.copy_(parameter.data + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
        if config.model_type == "gemma4_text" and name.endswith("q_norm.weight"):
            parameter.data *= 0.2  # there is no other scale of q.k
    model.save_pretrained(directory)
    return Written(model, directory)
