"""A mixture of experts: a router chooses a few gated MLPs for each row, and weighs what they give."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvist.base.errors import ConfigError
from kvist.models.linear import Linear

MAX_EXPERTS = 2**15  # of all layers; far above any model, and each is built


def check_count(count: int, layers: int, where: str) -> None:
    """Raises `ConfigError` for more experts than are built."""
    if count * layers > MAX_EXPERTS:
        raise ConfigError(f"{where}: at most {MAX_EXPERTS:,} experts are built, got {count} in each of {layers} layers")


@dataclass(frozen=True)
class ExpertsConfig:
    """`count` experts of `intermediate_size` numbers, of which each row has `chosen`. `normed`: their weights add up to
    one. `scale`: of all weights. `groups`: the experts of each row are of `chosen_groups` of so many groups, those
    whose best is best (DeepSeek-V2, arXiv 2405.04434, section 2.2.2)."""

    count: int
    chosen: int
    intermediate_size: int
    normed: bool
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1


def choose(scores: Tensor, config: ExpertsConfig) -> tuple[Tensor, Tensor]:
    """Router logits `[T, count]` → weights `[T, chosen]` float32 and experts `[T, chosen]` int64."""
    shares = scores.softmax(-1, dtype=torch.float32)
    if config.groups > 1:
        best = shares.unflatten(-1, (config.groups, -1)).amax(-1).topk(config.chosen_groups, dim=-1).indices
        open = torch.zeros(len(shares), config.groups, dtype=torch.bool).scatter_(1, best, True)
        shares = shares.masked_fill(~open.repeat_interleave(config.count // config.groups, 1), 0.0)
    weights, experts = shares.topk(config.chosen, dim=-1)
    if config.normed:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * config.scale, experts


class Experts(nn.Module):
    """The MLPs themselves. A row's bits depend on the row alone: experts are added in their order, and each computes
    as many rows as `fit` says, so that its products have widths whose rows agree."""

    def __init__(self, hidden: int, config: ExpertsConfig, activate: Callable[[Tensor], Tensor]) -> None:
        """`activate`: gates and ups `[T, 2 I]` → `[T, I]`."""
        super().__init__()
        inner, count = config.intermediate_size, config.count
        self.gate_up = nn.ModuleList(Linear(hidden, 2 * inner) for _ in range(count))
        self.down = nn.ModuleList(Linear(inner, hidden) for _ in range(count))
        self.fit: Callable[[int], int] = lambda rows: rows
        self._activate = activate

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """`x` `[T, hidden]`, each row's `weights` and `experts` `[T, chosen]` → `[T, hidden]`."""
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            rows, places = torch.where(experts == expert)
            count = len(rows)
            padded = x.new_zeros(self.fit(count), x.shape[1])
            padded[:count] = x[rows]
            found = self.down[expert](self._activate(self.gate_up[expert](padded)))[:count]
            out[rows] += found * weights[rows, places, None].to(x.dtype)
        return out
