"""The keys of published configs that change nothing at inference, in one table: by all families, and by one.

A key stands here because no decoder reads it when it computes (how the model was trained, how text is drawn, where it
came from), or because at some values it does nothing. Null asks for nothing, whatever the key. `quantization_config`
never stands here: it says that the weights are no numbers of ours.
"""

from collections.abc import Mapping
from typing import Any

# Read by no decoder, whatever they say.
INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path _num_labels _output_attentions
    _pre_quantization_dtype architectures assistant_confidence_threshold attention_dropout
    attention_probs_dropout_prob attn_implementation attn_pdrop auto_map aux_loss_alpha bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size custom_pipelines decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff
    eta_cutoff exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_decoder_ids
    forced_eos_token_id gradient_checkpointing guidance_scale hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
    line_by_line low_memory max_length max_new_tokens max_sequence_length max_time min_length min_new_tokens min_p
    neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_logits output_past output_router_logits output_scores pad_token_id
    penalty_alpha prefix pretraining_tp problem_type remove_invalid_values renormalize_logits
    reorder_and_upcast_attn repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef sep_token_id seq_aux sequence_bias stop_strings suppress_tokens task_specific_params
    temperature tf_legacy_loss token_healing tokenizer_class top_h top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache use_flash_attention use_flash_attn watermarking_config xla_device
    """.split()
)

# Read by some model of transformers, or asking for what is not there: the values at which nothing is asked for.
_ALL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
}

_SUMMARY = "summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"

# What one family's configs say, and its code does not read; `...`: whatever the value.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_special": (0,), "predict_special_tokens": ..., **dict.fromkeys(_SUMMARY.split(), ...)},
    "llama": {"max_window_layers": ..., "use_sliding_window": (False,)},
    "mistral": {"attention_bias": (False,), "max_window_layers": ..., "mlp_bias": (False,)},
    "qwen2": {"attention_bias": (True,), "mlp_bias": (False,)},
    "qwen3": {"mlp_bias": (False,)},
    "qwen3_moe": {"mlp_bias": (False,), "shared_expert_intermediate_size": (0,)},
    "smollm3": {},
    "phi": {"attention_bias": (True,)},
    # Phi-4-mini's own code reads the next three; at these values they are off.
    "phi3": {
        "attention_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
        "lm_head_bias": (False,),
        "mlp_bias": (False,),
    },
    "stablelm": {"attention_bias": (False,), "mlp_bias": (False,), "rotary_scaling_factor": (1,)},
    "gemma2": {"max_window_layers": ..., "mlp_bias": (False,)},
    "gemma3_text": {"max_window_layers": ..., "mlp_bias": (False,)},
    "deepseek_v2": {},
}


def is_inert(name: str, value: Any, family: str) -> bool:
    """Whether a config's key changes nothing at this value. `family`: its `model_type`; empty: of none."""
    if value is None or name in INERT:
        return True
    values = _FAMILIES.get(family, {}).get(name, _ALL.get(name, ()))
    return values is ... or value in values
