"""Initial weights, and the optimizer: AdamW, or AdamW with Muon for the matrices of the blocks."""

import math

import torch
from torch import Tensor

from kvist.models.decoder import Decoder
from kvist.train.settings import Method, TrainSettings

_EMBEDDING_STD = 0.02


def initialize(model: Decoder, seed: int) -> None:
    """Fill `model`: norms 1, biases 0, embeddings and head normal with deviation 0.02.

    Matrices of blocks are normal with deviation 1 / sqrt(inputs), so that they keep the size of what they are
    given at any width; those that add to the residual stream, two a layer, are divided by sqrt(2 layers), as
    GPT-2's are.
    """
    generator = torch.Generator().manual_seed(seed)
    products = {id(weight) for weight, _ in model.linears()}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = parameter.shape[1] ** -0.5 if id(parameter) in products else _EMBEDDING_STD
        if name.endswith(("attention.out.weight", "down.weight")):
            std /= math.sqrt(2 * model.config.layers)
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
