"""Initial weights, and the optimizer: AdamW, or AdamW with Muon for the matrices of the blocks."""

import math

import torch
from torch import Tensor

from kvist.models.decoder import Decoder
from kvist.train.settings import Method, TrainSettings

_STD = 0.02


def initialize(model: Decoder, seed: int) -> None:
    """Fill `model`: norms 1, biases 0, all else normal with deviation 0.02, as GPT-2.

    The products that add to the residual stream, two a layer, are divided by the square root of their number.
    """
    generator = torch.Generator().manual_seed(seed)
    residual = _STD / math.sqrt(2 * model.config.layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = residual if name.endswith(("attention.out.weight", "down.weight")) else _STD
            parameter.data.normal_(0.0, std, generator=generator)


class Optimizer:
    """Decay on matrices and embeddings only. One learning rate: Muon's steps are scaled to AdamW's size.

    Muon (Jordan et al. 2024) orthogonalizes a matrix's momentum; its scale is that of arXiv 2502.16982, 2.2.
    """

    def __init__(self, model: Decoder, settings: TrainSettings) -> None:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        self._parts: list[torch.optim.Optimizer] = []
        if settings.method is Method.MUON:
            blocks = [weight for weight, _ in model.linears()]
            matrices = [parameter for parameter in matrices if all(parameter is not weight for weight in blocks)]
            decay = settings.weight_decay
            self._parts.append(torch.optim.Muon(blocks, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._parts.append(torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True))

    def step(self, learning_rate: float) -> None:
        """Apply the gradients and drop them."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """The moments, by the names that `restore` expects."""
        return {
            f"{number}.{index}.{key}": value
            for number, part in enumerate(self._parts)
            for index, moments in part.state_dict()["state"].items()
            for key, value in moments.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the moments back from what `tensors` returned."""
        for number, part in enumerate(self._parts):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, index, key = name.split(".")
                if int(owner) == number:
                    state.setdefault(int(index), {})[key] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
