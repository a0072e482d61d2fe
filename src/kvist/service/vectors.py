"""What codecs do to the keys and values that a model makes of a text, as its own queries see them.

A query sees the tokens before its own block through the codecs, and only those are looked at here, as far as its
layer's window goes. Where keys are no stream of their own they are made of what the codecs leave, as attention makes
them. What a softmax cannot see is no error: a score that all keys share is taken off, query by query, before scores are
compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvist.cache.layout import Layout, StreamLayout
from kvist.cache.spec import LayerSpec, window_of
from kvist.service.calibration import Vectors


@dataclass(frozen=True)
class Agreement:
    """Second moments `[heads]` float64 of numbers before (`exact`) and after (`coded`) a codec, and between them."""

    exact: Tensor
    coded: Tensor
    between: Tensor

    @staticmethod
    def of(exact: Tensor, coded: Tensor) -> "Agreement":
        """Of `[heads, ...]`, as they are: whatever mean is to be taken off has been."""
        exact, coded = exact.flatten(1), coded.flatten(1)
        pairs = ((exact, exact), (coded, coded), (exact, coded))
        return Agreement(*((x * y).sum(1, dtype=torch.float64) for x, y in pairs))

    @staticmethod
    def nothing(heads: int) -> "Agreement":
        return Agreement(*torch.zeros(3, heads, dtype=torch.float64))

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(self.exact + other.exact, self.coded + other.coded, self.between + other.between)

    def correlation(self) -> Tensor:
        """`[heads]`. Numbers that do not vary at all agree (1) when neither side's do, else not (0)."""
        spread = (self.exact * self.coded).sqrt()
        still = ((self.exact == 0) & (self.coded == 0)).double()
        return torch.where(spread > 0, self.between / spread, still).clamp(-1, 1)

    def kept(self) -> Tensor:
        """`[heads]`: 1 less the mean squared error, relative to the mean square of the exact numbers; where these are
        all 0, whether the coded ones are."""
        error = self.exact + self.coded - 2 * self.between
        return torch.where(self.exact > 0, 1 - error / self.exact, (error == 0).double())

    def bias(self) -> Tensor:
        """`[heads]`: slope of the least-squares line from exact to coded numbers, less 1. 0: right on average."""
        return torch.where(self.exact > 0, self.between / self.exact - 1, 0.0)


def decoded(stream: StreamLayout, x: Tensor, block_size: int) -> Tensor:
    """What the codec leaves of `x` `[T, heads, dim]`, whole blocks of it, with the frame's mean added back: float32."""
    codec, frame, count = stream.codec, stream.frame, len(x) // block_size
    # All blocks at once, as so many heads of one: a vector's codes depend on nothing beside it.
    whole = x[: count * block_size].float().unflatten(0, (count, block_size)).transpose(0, 1).flatten(1, 2)
    wide = replace(stream.stream, heads=count * stream.stream.heads)
    repeated = replace(frame, mean=frame.mean.repeat(count, 1), order=frame.order.repeat(count, 1))
    left = codec.decode(codec.encode(whole, wide, repeated), wide, repeated)
    if codec.centred:
        left = left + repeated.mean
    return left.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def compare_scores(seen: Vectors, coded: Sequence[Tensor], block_size: int) -> list[Agreement]:
    """Scores of each query with the keys that it sees of earlier blocks, against those with each of `coded` keys
    `[whole blocks, kv_heads, D]`; each query's mean score taken off. By query head."""
    keys, _ = seen.sides(seen.streams)
    found = [Agreement.nothing(seen.q.shape[1]) for _ in coded]
    for start, rows in _queries(seen, block_size):
        exact = _scores(rows, start, seen, keys[:start])
        for index, other in enumerate(coded):
            found[index] += Agreement.of(exact, _scores(rows, start, seen, other[:start]))
    return found


def compare_outputs(seen: Vectors, coded: Sequence[tuple[Tensor, Tensor]], block_size: int) -> list[Agreement]:
    """Attention's output for the queries behind a whole block, own block included, against that with each pair of keys
    and values `[whole blocks, kv_heads, D]` in earlier ones; each channel's mean over a block of queries taken off. By
    query head."""
    sides = seen.sides(seen.streams)
    found = [Agreement.nothing(seen.q.shape[1]) for _ in coded]
    for start, rows in _queries(seen, block_size):
        own = slice(start, start + rows.shape[2])
        exact = _outputs(rows, start, seen, *(x[: own.stop] for x in sides))
        for index, pair in enumerate(coded):
            mixed = (torch.cat((x[:start], side[own])) for x, side in zip(pair, sides, strict=True))
            found[index] += Agreement.of(exact, _outputs(rows, start, seen, *mixed))
    return found


@dataclass(frozen=True)
class VectorScore:
    """One choice of codecs. Means and worsts are over layers and heads.

    `distortion_k`, `distortion_v`: mean squared error of a head's keys, as attention has them, relative to their
    variance, and of its values, relative to their mean square. `bias`: mean over heads of `Agreement.bias` of the
    scores. `logit_correlation_worst`: of the scores of one head, in layer `logit_correlation_layer`.
    """

    distortion_k: float
    distortion_v: float
    bias: float
    logit_correlation_worst: float
    logit_correlation_layer: int

    @property
    def distortion(self) -> float:
        return (self.distortion_k + self.distortion_v) / 2


class VectorMeter:
    """Sums over windows of text for several layouts of one model's cache; `see` is called layer by layer."""

    def __init__(self, layouts: Sequence[Layout]) -> None:
        self._layouts = layouts
        specs = [layer.spec for layer in layouts[0].layers]
        self._owners = [number if spec.source is None else spec.source for number, spec in enumerate(specs)]
        heads = {owner: specs[owner].streams[0].heads for owner in self._owners}
        self._errors = [{n: torch.zeros(2, heads[n], dtype=torch.float64) for n in heads} for _ in layouts]
        self._energy = {n: torch.zeros(2, heads[n], dtype=torch.float64) for n in heads}
        self._scores: list[dict[int, Agreement]] = [{} for _ in layouts]

    def see(self, layer: int, seen: Vectors) -> None:
        """One window's vectors of one layer."""
        size, owner, coded_keys = self._layouts[0].block_size, self._owners[layer], []
        whole = len(seen.v) // size * size
        keys, values = seen.sides([x[:whole] for x in seen.streams])
        if owner == layer:
            self._energy[layer] += torch.stack([_energy(_about_mean(keys, 0)), _energy(values)])
        for index, layout in enumerate(self._layouts):
            streams = zip(layout.layers[owner].streams, seen.streams, strict=True)
            k, v = seen.sides([decoded(stream, x, size) for stream, x in streams])
            if owner == layer:
                self._errors[index][layer] += torch.stack([_energy(k - keys), _energy(v - values)])
            coded_keys.append(k)
        for index, found in enumerate(compare_scores(seen, coded_keys, size)):
            before = self._scores[index].get(layer)
            self._scores[index][layer] = found if before is None else before + found

    def scores(self) -> list[VectorScore]:
        """One for each layout, in order. At least one window was seen."""
        return [self._score(index) for index in range(len(self._layouts))]

    def _score(self, index: int) -> VectorScore:
        relative = [self._errors[index][layer] / energy for layer, energy in self._energy.items()]
        agreements = [self._scores[index][layer] for layer in range(len(self._owners))]
        worst = torch.stack([found.correlation().min() for found in agreements])
        return VectorScore(
            distortion_k=float(torch.cat([of[0] for of in relative]).mean()),
            distortion_v=float(torch.cat([of[1] for of in relative]).mean()),
            bias=float(torch.cat([found.bias() for found in agreements]).mean()),
            logit_correlation_worst=float(worst.min()),
            logit_correlation_layer=int(worst.argmin()),
        )


def _queries(seen: Vectors, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """The first position of each block that has earlier ones, and its queries
    `[kv_heads, queries of a head, rows, D]` float32."""
    for start in range(block_size, len(seen.q), block_size):
        rows = seen.q[start : start + block_size].float()
        yield start, rows.unflatten(1, (seen.v.shape[1], -1)).permute(1, 2, 0, 3)


def _scores(rows: Tensor, start: int, seen: Vectors, keys: Tensor) -> Tensor:
    """Of queries from `start` on with keys from 0 on `[heads, rows, keys]`, about the mean of what each query sees of
    them; 0 for what it does not."""
    visible = _visible(seen.spec, start, rows.shape[2], len(keys))
    scores = _capped(rows, keys, seen).where(visible, 0.0)
    mean = scores.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (scores - mean).where(visible, 0.0).flatten(0, 1)


def _outputs(rows: Tensor, start: int, seen: Vectors, keys: Tensor, values: Tensor) -> Tensor:
    """Of queries from `start` on over keys and values from 0 on `[heads, rows, D]`, about each channel's mean."""
    visible = _visible(seen.spec, start, rows.shape[2], len(keys))
    weights = _capped(rows, keys, seen).masked_fill(~visible, -torch.inf).softmax(-1)
    return _about_mean(weights @ values.transpose(0, 1)[:, None], -2).flatten(0, 1)


def _capped(rows: Tensor, keys: Tensor, seen: Vectors) -> Tensor:
    """What the softmax is given, `[kv_heads, queries of a head, rows, keys]`."""
    scores, cap = rows @ keys.permute(1, 2, 0)[:, None] * seen.scale, seen.spec.softcap
    return cap * torch.tanh(scores / cap) if cap else scores


def _visible(spec: LayerSpec, start: int, rows: int, keys: int) -> Tensor:
    """Whether each of `rows` queries from `start` on sees each of the keys from 0 on: `[rows, keys]`."""
    visible, window = torch.ones(rows, keys, dtype=torch.bool).tril(start), window_of(spec.retention)
    return visible.triu(start + 1 - window) if window else visible


def _about_mean(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _energy(x: Tensor) -> Tensor:
    """x `[T, heads, D]`: sum of squares by head, float64."""
    return x.double().square().sum((0, 2))
