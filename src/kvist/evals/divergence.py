"""How far the predictions of two runs are apart."""

from torch import Tensor


def kl_divergences(base: Tensor, other: Tensor) -> Tensor:
    """D(base ‖ other) in nats of each pair of rows of logits, `[..., vocab]` → `[...]` float64.

    Not below 0, and exactly 0 where the logits have the same bits.
    """
    ours, theirs = base.double().log_softmax(-1), other.double().log_softmax(-1)
    return (ours.exp() * (ours - theirs)).sum(-1).clamp_min(0)
