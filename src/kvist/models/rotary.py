"""What decoders have in common whose blocks all rotate in the same way."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from kvist.cache.view import LayerView
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.layers import RopeTable


class RotaryDecoder(Decoder):
    """See `Decoder`. A block is called with the hidden states `[T, hidden]`, the step's rotation and its layer's
    view."""

    def __init__(self, config: ModelConfig, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__(config, blocks, norm)
        assert config.rope is not None
        self._rope = RopeTable(config.rope, config.rotary_dim)

    def forward(self, tokens: Tensor, positions: Tensor, layers: Sequence[LayerView]) -> Tensor:
        x = self.embed(tokens)
        rotation = self._rope.at(positions, x.dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotation, layer)
        return self.norm(x)
