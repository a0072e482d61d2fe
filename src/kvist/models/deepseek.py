"""DeepSeek-V2: multi-head latent attention (arXiv 2405.04434), in its absorbed form everywhere, and experts of which
some are everybody's.

All heads share one latent a token, and the part of the keys that positions rotate. What turns latents into the keys and
values of a head is applied to its queries and to what attention gives, so neither keys nor values are ever made."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvist.base.errors import ConfigError, brief
from kvist.cache.spec import LayerSpec, latent
from kvist.cache.view import LayerView
from kvist.models.config import Activation, ModelConfig
from kvist.models.decoder import Activations, Slot, linear_slots
from kvist.models.experts import Experts, ExpertsConfig, check_count, choose
from kvist.models.keys import Keys, read_activation, read_rope, yarn_scale
from kvist.models.layers import RMSNorm, Rotation
from kvist.models.linear import Linear
from kvist.models.llama import outer_slots
from kvist.models.qwen3_moe import expert_slots
from kvist.models.rotary import RotaryDecoder

_LATENT_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """`rank`: numbers of a latent; `query_rank`: of that of the queries, if they have one. Of a head's queries `plain`
    numbers meet the latent and `rotary` the rotated part; `values`: numbers of a head's values. `scale`: of q.k.
    `dense`: the first so many layers have no experts. `shared_size`: numbers within the experts of everybody."""

    rank: int
    query_rank: int | None
    plain: int
    rotary: int
    values: int
    scale: float
    dense: int
    experts: ExpertsConfig
    shared_size: int
    down_bias: bool  # of the products that lead to latents

    def naive_numbers(self) -> int:
        return self.layers * self.heads * (self.plain + self.rotary + self.values)

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        return (latent(self.rank, self.rotary),) * self.layers


def read(keys: Keys) -> DeepseekConfig:
    """The config of a checkpoint."""
    heads = keys.take("num_attention_heads", int, 32)
    keys.take("num_key_value_heads", int, heads)
    keys.require("moe_layer_freq", 1)
    keys.require("scoring_func", "softmax")
    keys.require("norm_topk_prob", False)
    keys.require("ep_size", 1)
    plain, rotary = keys.take("qk_nope_head_dim", int, 128), keys.take("qk_rope_head_dim", int, 64)
    keys.take("head_dim", int, rotary)
    keys.take("qk_head_dim", int, plain + rotary)
    scaling = keys.peek("rope_parameters") or keys.peek("rope_scaling") or {}
    rope, _ = read_rope(keys, 10_000.0)
    scale, all_dims = (plain + rotary) ** -0.5, scaling.get("mscale_all_dim", 0) if isinstance(scaling, dict) else 0
    if rope.yarn is not None and all_dims:
        scale *= yarn_scale(rope.yarn.factor, all_dims) ** 2
    bias, rank = keys.take("attention_bias", bool, False), keys.take("kv_lora_rank", int, 512)
    keys.require("mlp_bias", False)
    experts, shared_size = _experts(keys)
    layers = keys.take("num_hidden_layers", int, 32)
    check_count(experts.count, layers, keys.where)
    return DeepseekConfig(
        family="deepseek_v2",
        vocab_size=keys.take("vocab_size", int, 102_400),
        hidden_size=keys.take("hidden_size", int, 4096),
        intermediate_size=keys.take("intermediate_size", int, 11_008),
        layers=layers,
        heads=heads,
        kv_heads=1,
        head_dim=rank,
        rotated=rotary,
        max_positions=keys.take("max_position_embeddings", int, 2048),
        norm_eps=keys.take("rms_norm_eps", float, 1e-6),
        activation=read_activation(keys, "hidden_act", "silu", {Activation.SILU}),
        rope=rope,
        out_bias=bias,
        down_bias=bias,
        tied=keys.take("tie_word_embeddings", bool, False),
        rank=rank,
        query_rank=keys.null_or("q_lora_rank", int, 1536),
        plain=plain,
        rotary=rotary,
        values=keys.take("v_head_dim", int, 128),
        scale=scale,
        dense=keys.take("first_k_dense_replace", int, 0),
        experts=experts,
        shared_size=shared_size,
    )


def _experts(keys: Keys) -> tuple[ExpertsConfig, int]:
    """The experts, and the numbers within those that are everybody's."""
    count, chosen = keys.take("n_routed_experts", int, 64), keys.take("num_experts_per_tok", int)
    inner, everybodys = keys.take("moe_intermediate_size", int, 1407), keys.take("n_shared_experts", int, 2)
    scale, method = keys.take("routed_scaling_factor", float, 1.0), keys.take("topk_method", str, "greedy")
    groups, chosen_groups = keys.take("n_group", int, 1), keys.take("topk_group", int, 1)
    if method == "greedy":
        groups = chosen_groups = 1
    elif method != "group_limited_greedy":
        raise ConfigError(
            f"{keys.where}: topk_method={brief(method)} is not supported (greedy, group_limited_greedy are)"
        )
    sound = 1 <= chosen <= count <= 1 << 14 and 1 <= inner <= 1 << 24 and 1 <= everybodys <= 1 << 10 and scale > 0
    if not sound or not 1 <= chosen_groups <= groups or count % groups or chosen > count // groups * chosen_groups:
        raise ConfigError(f"{keys.where}: {chosen} of {count} experts of {inner} numbers in {groups} groups cannot be")
    return ExpertsConfig(count, chosen, inner, False, scale, groups, chosen_groups), inner * everybodys


class Attention(nn.Module):
    """Multi-head latent attention."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self._config = config
        head = config.plain + config.rotary
        if config.query_rank is None:
            self.q = Linear(config.hidden_size, config.heads * head)
        else:
            self.q_down = Linear(config.hidden_size, config.query_rank, config.down_bias)
            self.q_norm = RMSNorm(config.query_rank, _LATENT_EPS)
            self.q = Linear(config.query_rank, config.heads * head)
        self.kv_down = Linear(config.hidden_size, config.rank + config.rotary, config.down_bias)
        self.kv_norm = RMSNorm(config.rank, _LATENT_EPS)
        # Of each head: from its queries to what meets the latent, and from the mixed latents to its values.
        self.absorb = nn.ModuleList(Linear(config.plain, config.rank) for _ in range(config.heads))
        self.expand = nn.ModuleList(Linear(config.rank, config.values) for _ in range(config.heads))
        self.out = Linear(config.heads * config.values, config.hidden_size, config.out_bias)

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        config = self._config
        q = self.q(x if config.query_rank is None else self.q_norm(self.q_down(x)))
        plain, rotary = q.unflatten(-1, (config.heads, -1)).split((config.plain, config.rotary), dim=-1)
        down, rope = self.kv_down(x).split((config.rank, config.rotary), dim=-1)
        layer.write(rotation.apply(_halves(rope)[:, None]), self.kv_norm(down)[:, None])
        met = torch.stack([absorb(plain[:, head].contiguous()) for head, absorb in enumerate(self.absorb)], dim=1)
        mixed = layer.attend(torch.cat((met, rotation.apply(_halves(rotary))), dim=-1), config.scale)
        return self.out(
            torch.cat([expand(mixed[:, head].contiguous()) for head, expand in enumerate(self.expand)], dim=-1)
        )


def _halves(x: Tensor) -> Tensor:
    """Pairs of neighbours, as these checkpoints rotate them, as halves that rotate together."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


class Mlp(nn.Module):
    """Gated SiLU."""

    def __init__(self, hidden: int, inner: int, activations: Activations) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)
        self._activations = activations

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self._activations.silu_mul(self.gate_up(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DeepseekConfig, index: int, activations: Activations) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm = RMSNorm(hidden, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(hidden, config.norm_eps)
        self.experts = None
        if index < config.dense:
            self.mlp = Mlp(hidden, config.intermediate_size, activations)
        else:
            self.router = Linear(hidden, config.experts.count)
            self.experts = Experts(hidden, config.experts, activations.silu_mul)
            self.mlp = Mlp(hidden, config.shared_size, activations)
        self._config = config.experts

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        x = x + self.attention(self.attention_norm(x), rotation, layer)
        normed = self.mlp_norm(x)
        if self.experts is None:
            return x + self.mlp(normed)
        return x + (self.experts(normed, *choose(self.router(normed), self._config)) + self.mlp(normed))


class Deepseek(RotaryDecoder):
    """See `Decoder`."""

    config: DeepseekConfig

    def __init__(self, config: DeepseekConfig, activations: Activations) -> None:
        blocks = (Block(config, index, activations) for index in range(config.layers))
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))

    def slots(self) -> list[Slot]:
        config, slots = self.config, outer_slots(self.config)
        for index in range(config.layers):
            theirs, ours = f"model.layers.{index}.", f"blocks.{index}."
            slots += self._attention_slots(theirs, ours)
            dense = index < config.dense
            inner, place = (config.intermediate_size, "mlp.") if dense else (config.shared_size, "mlp.shared_experts.")
            for name, parameter, start, shape in (
                ("gate_proj", "gate_up", 0, (inner, config.hidden_size)),
                ("up_proj", "gate_up", inner, (inner, config.hidden_size)),
                ("down_proj", "down", 0, (config.hidden_size, inner)),
            ):
                slots.append(Slot(f"{theirs}{place}{name}.weight", f"{ours}mlp.{parameter}.weight", start, shape))
            if not dense:
                slots += expert_slots(config.hidden_size, config.experts, f"{theirs}mlp.", ours)
        return slots

    def _attention_slots(self, theirs: str, ours: str) -> list[Slot]:
        config, hidden = self.config, self.config.hidden_size
        own, place, head = f"{theirs}self_attn.", f"{ours}attention.", config.plain + config.rotary
        slots = [
            Slot(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.weight", 0, (hidden,)),
            Slot(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.weight", 0, (hidden,)),
            Slot(f"{own}kv_a_layernorm.weight", f"{place}kv_norm.weight", 0, (config.rank,)),
        ]
        rows = config.heads * head
        if config.query_rank is None:
            slots.append(Slot(f"{own}q_proj.weight", f"{place}q.weight", 0, (rows, hidden)))
        else:
            shape = (config.query_rank, hidden)
            slots += linear_slots(f"{own}q_a_proj", f"{place}q_down", 0, shape, config.down_bias)
            slots.append(Slot(f"{own}q_a_layernorm.weight", f"{place}q_norm.weight", 0, shape[:1]))
            slots.append(Slot(f"{own}q_b_proj.weight", f"{place}q.weight", 0, (rows, config.query_rank)))
        shape = (config.rank + config.rotary, hidden)
        slots += linear_slots(f"{own}kv_a_proj_with_mqa", f"{place}kv_down", 0, shape, config.down_bias)
        shape = (hidden, config.heads * config.values)
        slots += linear_slots(f"{own}o_proj", f"{place}out", 0, shape, config.out_bias)
        # One matrix makes keys and values of all heads.
        both = config.plain + config.values
        whole, name = (config.heads * both, config.rank), f"{own}kv_b_proj.weight"
        for index in range(config.heads):
            first = index * both
            middle, last = first + config.plain, first + both
            shape = (config.plain, config.rank)
            slots.append(Slot(name, f"{place}absorb.{index}.weight", 0, shape, True, (first, middle), whole))
            shape = (config.values, config.rank)
            slots.append(Slot(name, f"{place}expand.{index}.weight", 0, shape, False, (middle, last), whole))
        return slots
