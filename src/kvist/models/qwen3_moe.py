"""Qwen3-MoE: Qwen3, whose MLPs are mixtures of experts, all or every so many."""

from dataclasses import dataclass, fields

from torch import Tensor, nn

from kvist.base.errors import ConfigError, brief
from kvist.cache.view import LayerView
from kvist.models import llama
from kvist.models.config import ModelConfig
from kvist.models.decoder import Activations, Slot
from kvist.models.experts import Experts, ExpertsConfig, check_count, choose
from kvist.models.keys import Keys
from kvist.models.layers import RMSNorm, Rotation
from kvist.models.linear import Linear
from kvist.models.rotary import RotaryDecoder


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(ModelConfig):
    """`experts`: of the layers that have some; `dense`: the layers that have an MLP of `intermediate_size` instead."""

    experts: ExpertsConfig
    dense: tuple[int, ...] = ()


def read(keys: Keys) -> Qwen3MoeConfig:
    """The config of a checkpoint."""
    experts = read_experts(keys)
    step, plain = keys.take("decoder_sparse_step", int, 1), keys.take("mlp_only_layers", list, [])
    base = llama.read(keys, "qwen3_moe")
    check_count(experts.count, base.layers, keys.where)
    if step < 1 or any(type(layer) is not int for layer in plain):
        raise ConfigError(f"{keys.where}: decoder_sparse_step={step} and mlp_only_layers={brief(plain)} do not fit")
    dense = tuple(layer for layer in range(base.layers) if layer in plain or (layer + 1) % step)
    return Qwen3MoeConfig(**{f.name: getattr(base, f.name) for f in fields(base)}, experts=experts, dense=dense)


def read_experts(keys: Keys) -> ExpertsConfig:
    """What the config says of its experts."""
    keys.stated(("moe_intermediate_size", "num_experts_per_tok"))
    count = keys.take("num_local_experts", int, keys.take("num_experts", int, None))
    chosen = keys.take("num_experts_per_tok", int)
    inner, normed = keys.take("moe_intermediate_size", int), keys.take("norm_topk_prob", bool, False)
    if count is None or not 1 <= chosen <= count <= 1 << 14 or not 1 <= inner <= 1 << 24:
        raise ConfigError(f"{keys.where}: {chosen} of {count} experts of {inner} numbers cannot be")
    return ExpertsConfig(count, chosen, inner, normed)


class MoeBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: Qwen3MoeConfig, activations: Activations) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = llama.Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.router = Linear(config.hidden_size, config.experts.count)
        self.experts = Experts(config.hidden_size, config.experts, activations.silu_mul)
        self._config = config.experts

    def forward(self, x: Tensor, rotation: Rotation, layer: LayerView) -> Tensor:
        """`x` `[T, hidden]` → `[T, hidden]`."""
        x = x + self.attention(self.attention_norm(x), rotation, layer)
        normed = self.mlp_norm(x)
        return x + self.experts(normed, *choose(self.router(normed), self._config))


class Qwen3Moe(RotaryDecoder):
    """See `Decoder`."""

    config: Qwen3MoeConfig

    def __init__(self, config: Qwen3MoeConfig, activations: Activations) -> None:
        blocks = (
            (llama.Block if layer in config.dense else MoeBlock)(config, activations) for layer in range(config.layers)
        )
        super().__init__(config, blocks, RMSNorm(config.hidden_size, config.norm_eps))

    def slots(self) -> list[Slot]:
        config = self.config
        slots = llama.outer_slots(config)
        for index in range(config.layers):
            theirs, ours = f"model.layers.{index}.", f"blocks.{index}."
            slots += llama.attention_slots(config, theirs, ours)
            if index in config.dense:
                slots += llama.mlp_slots(config, theirs, ours)
            else:
                slots += expert_slots(config.hidden_size, config.experts, f"{theirs}mlp.", ours)
        return slots


def expert_slots(hidden: int, config: ExpertsConfig, theirs: str, ours: str) -> list[Slot]:
    """Of a router and its experts."""
    inner = config.intermediate_size
    slots = [Slot(f"{theirs}gate.weight", f"{ours}router.weight", 0, (config.count, hidden))]
    for expert in range(config.count):
        one, parameter = f"{theirs}experts.{expert}.", f"{ours}experts.gate_up.{expert}.weight"
        slots.append(Slot(f"{one}gate_proj.weight", parameter, 0, (inner, hidden)))
        slots.append(Slot(f"{one}up_proj.weight", parameter, inner, (inner, hidden)))
        slots.append(Slot(f"{one}down_proj.weight", f"{ours}experts.down.{expert}.weight", 0, (hidden, inner)))
    return slots
