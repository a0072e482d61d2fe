"""Our run beside attention written out plainly: how far apart may two right answers be?

Their bits differ, as both round, in another order. What that comes to is the model's, its weights' and its codecs' to
say, and it is measured: plain attention is computed once more, its queries and results moved by no more than what
rounding moves them. Where the last bit of a number decides which code it takes, or to which whole number it is rounded
before it meets packed weights, or which experts a token, that is most of the difference, and differs between models by
orders of magnitude.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvist.cache.layout import LayerLayout, StreamLayout
from kvist.cache.step import Tie
from kvist.models.decoder import LayerView
from kvist.models.experts import Experts
from kvist.models.plain import CodedPlainView, PlainView
from kvist.service.loaded import Loaded

# Of the largest logit, the least that is ever allowed: what rounding alone does to logits that are computed, or cached,
# in that type.
PLAIN_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# The same of packed weights: activations are rounded to 8 bits, and the last bit of one decides to which number.
PACKED_TOLERANCE = 3e-2
# Our run may be so many times as far away as the moved runs are: it rounds in more places than they are moved in.
TIMES = 3.0
MOVED_RUNS = 2
_BYTE = 1 / 254  # of the largest number of a vector: what rounding it to bytes moves a number by at most


@dataclass(frozen=True)
class Nearness:
    """Distances of logits, of the largest logit: `error` of our run, `measured` of the moved ones. `statistic`: which
    of all rows' errors is compared, "largest" or "nine_in_ten"."""

    statistic: str
    error: float
    measured: float
    tolerance: float


@torch.inference_mode()
def nearness(loaded: Loaded, tokens: Sequence[int], ours: Tensor) -> Nearness:
    """`ours` `[len(tokens), vocab]`: the logits of our run from nothing."""
    theirs = _logits(loaded, tokens, lambda view: view)
    # Where the last bit decides, a few rows may come out otherwise: nine of ten must agree all the same.
    experts = any(isinstance(module, Experts) for module in loaded.model.modules())
    decides = experts or loaded.model.is_packed or bool(loaded.layout.open_bytes)
    apart = partial(_apart, theirs=theirs, share=0.9 if decides else 1.0)
    measured = 0.0
    for seed in range(MOVED_RUNS if decides else 0):
        moves = _Moves(loaded, seed)
        measured = max(measured, apart(_logits(loaded, tokens, partial(_MovedView, moves=moves))))
    return Nearness(
        "nine_in_ten" if decides else "largest", apart(ours), measured, max(_least(loaded), TIMES * measured)
    )


def _apart(logits: Tensor, theirs: Tensor, share: float) -> float:
    """The least distance that a share of all rows keep to, of the largest logit."""
    return float(((logits - theirs).abs().amax(1) / theirs.abs().max()).quantile(share))


def _least(loaded: Loaded) -> float:
    """What rounding may do at least: that of the weights' type, and of the types in the cache."""
    streams = [stream for layer in loaded.layout.layers for stream in layer.streams]
    types = {plane.dtype for stream in streams if stream.codec.in_place for plane in stream.planes}
    types.add(next(loaded.model.parameters()).dtype)
    packed = PACKED_TOLERANCE if loaded.model.is_packed else 0.0
    return max(packed, *(PLAIN_TOLERANCE[kind] for kind in types))


def _logits(loaded: Loaded, tokens: Sequence[int], wrap: Callable[[LayerView], LayerView]) -> Tensor:
    """A run from nothing over plain attention, without pages. `wrap`: what becomes of each layer's view."""
    views = list[LayerView]()
    for layer in loaded.layout.layers:
        source = layer.spec.source
        views.append(wrap(_oracle(layer, loaded.layout.block_size)) if source is None else views[source])
    hidden = loaded.model(torch.tensor(tokens), torch.arange(len(tokens)), views)
    return loaded.model.logits(hidden)


class _Moves:
    """Moves numbers at random by as much as our kernels round them: those over codes round queries, and the weights
    of values, to bytes; others the last bit of a result."""

    def __init__(self, loaded: Loaded, seed: int) -> None:
        self._bytes = bool(loaded.layout.open_bytes)
        self._generator = torch.Generator().manual_seed(seed)

    def query(self, q: Tensor) -> Tensor:
        return self._move(q, q.float().abs().amax(-1, keepdim=True) * _BYTE) if self._bytes else q

    def result(self, x: Tensor) -> Tensor:
        numbers = x.float().abs()
        rounded = numbers * torch.finfo(x.dtype).eps / 2
        return self._move(x, numbers.amax(-1, keepdim=True) * _BYTE + rounded if self._bytes else rounded)

    def _move(self, x: Tensor, most: Tensor) -> Tensor:
        return (x.float() + most * (2 * torch.rand(x.shape, generator=self._generator) - 1)).to(x.dtype)


class _MovedView:
    """A `LayerView` whose queries and results are moved."""

    def __init__(self, view: LayerView, moves: _Moves) -> None:
        self._view, self._moves = view, moves

    def write(self, k: Tensor | None, v: Tensor) -> None:
        self._view.write(k, v)

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        return self._moves.result(self._view.attend(self._moves.query(q), scale, tie))


def _oracle(layer: LayerLayout, block_size: int) -> LayerView:
    """Attention of that layer written out plainly, over what its codecs leave of earlier blocks."""
    if not layer.opens:
        return PlainView(spec=layer.spec)

    def coded(stream: StreamLayout, x: Tensor) -> Tensor:
        found = stream.codec.decode(stream.codec.encode(x, stream.stream, stream.frame), stream.stream, stream.frame)
        return found + stream.frame.mean if stream.codec.centred else found

    first, last = layer.streams[0], layer.streams[-1]
    return CodedPlainView(block_size, partial(coded, first), partial(coded, last), layer.spec)
