"""What codecs do to the keys and values that a model makes of a text, as its own queries see them.

A query sees the tokens before its own block through the codecs, and only those are looked at here. What a softmax
cannot see is no error: a score that all keys share is taken off, query by query, before scores are compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.layout import Layout, StreamLayout
from kvist.cache.spec import Reading
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
    """Scores q.k of each query with the keys of earlier blocks, against those with each of `coded` keys
    `[whole blocks, kv_heads, D]`; each query's mean score taken off. By query head."""
    found = [Agreement.nothing(seen.q.shape[1]) for _ in coded]
    for start, rows in _queries(seen, block_size):
        exact = _scores(rows, seen.k[:start].float())
        for index, keys in enumerate(coded):
            found[index] += Agreement.of(exact, _scores(rows, keys[:start]))
    return found


def compare_outputs(seen: Vectors, coded: Sequence[tuple[Tensor, Tensor]], block_size: int) -> list[Agreement]:
    """Attention's output for the queries that see earlier blocks, own block included, against that with each pair of
    keys and values `[whole blocks, kv_heads, D]` in those; each channel's mean over a block of queries taken off. By
    query head."""
    found = [Agreement.nothing(seen.q.shape[1]) for _ in coded]
    for start, rows in _queries(seen, block_size):
        exact = _outputs(rows, seen, start, seen.k[:start].float(), seen.v[:start].float())
        for index, (keys, values) in enumerate(coded):
            found[index] += Agreement.of(exact, _outputs(rows, seen, start, keys[:start], values[:start]))
    return found


@dataclass(frozen=True)
class VectorScore:
    """One choice of codecs. Means and worsts are over layers and heads.

    `distortion_k`, `distortion_v`: mean squared error of a head's keys, relative to their variance, and of its values,
    relative to their mean square. `bias`: mean over heads of `Agreement.bias` of the scores.
    `logit_correlation_worst`: of the scores of one head, in layer `logit_correlation_layer`.
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
        # Where keys and values are streams of their own.
        self._layers = [n for n, spec in enumerate(specs) if spec.streams and spec.reading is Reading.APART]
        if not self._layers:
            raise ConfigError("the vectors of a cache are compared where layers keep keys and values, which none does")
        heads = {n: specs[n].streams[0].heads for n in self._layers}
        self._errors = [{n: torch.zeros(2, heads[n], dtype=torch.float64) for n in self._layers} for _ in layouts]
        self._energy = {n: torch.zeros(2, heads[n], dtype=torch.float64) for n in self._layers}
        self._scores: list[dict[int, Agreement]] = [{} for _ in layouts]

    def see(self, layer: int, seen: Vectors) -> None:
        """One window's vectors of one layer."""
        if layer not in self._energy:
            return
        size = self._layouts[0].block_size
        whole = len(seen.k) // size * size
        keys, values = seen.k[:whole].float(), seen.v[:whole].float()
        self._energy[layer] += torch.stack([_energy(_about_mean(keys, 0)), _energy(values)])
        coded_keys = []
        for index, layout in enumerate(self._layouts):
            k, v = (
                decoded(stream, x, size) for stream, x in zip(layout.layers[layer].streams, (keys, values), strict=True)
            )
            self._errors[index][layer] += torch.stack([_energy(k - keys), _energy(v - values)])
            coded_keys.append(k)
        for index, found in enumerate(compare_scores(seen, coded_keys, size)):
            before = self._scores[index].get(layer)
            self._scores[index][layer] = found if before is None else before + found

    def scores(self) -> list[VectorScore]:
        """One for each layout, in order. At least one window was seen."""
        return [self._score(index) for index in range(len(self._layouts))]

    def _score(self, index: int) -> VectorScore:
        relative = torch.stack([self._errors[index][layer] / self._energy[layer] for layer in self._layers])
        agreements = [self._scores[index][layer] for layer in self._layers]
        worst = torch.stack([found.correlation().min() for found in agreements])
        return VectorScore(
            distortion_k=float(relative[:, 0].mean()),
            distortion_v=float(relative[:, 1].mean()),
            bias=float(torch.cat([found.bias() for found in agreements]).mean()),
            logit_correlation_worst=float(worst.min()),
            logit_correlation_layer=self._layers[int(worst.argmin())],
        )


def _queries(seen: Vectors, block_size: int) -> Iterator[tuple[int, Tensor]]:
    """The first position of each block that has earlier ones, and its queries
    `[kv_heads, queries of a head, rows, D]` float32."""
    for start in range(block_size, len(seen.q), block_size):
        rows = seen.q[start : start + block_size].float()
        yield start, rows.unflatten(1, (seen.k.shape[1], -1)).permute(1, 2, 0, 3)


def _scores(rows: Tensor, keys: Tensor) -> Tensor:
    """`[heads, rows, keys]`, about each query's mean."""
    return _about_mean((rows @ keys.permute(1, 2, 0)[:, None]).flatten(0, 1), -1)


def _outputs(rows: Tensor, seen: Vectors, start: int, keys: Tensor, values: Tensor) -> Tensor:
    """`[heads, rows, D]`, about each channel's mean; `keys` and `values` are those of earlier blocks."""
    end = start + rows.shape[2]
    k = torch.cat((keys, seen.k[start:end].float())).permute(1, 2, 0)[:, None]
    v = torch.cat((values, seen.v[start:end].float())).transpose(0, 1)[:, None]
    hidden = torch.ones(end - start, end, dtype=torch.bool).triu(start + 1)
    weights = (rows @ k * seen.scale).masked_fill(hidden, -torch.inf).softmax(-1)
    return _about_mean(weights @ v, -2).flatten(0, 1)


def _about_mean(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _energy(x: Tensor) -> Tensor:
    """x `[T, heads, D]`: sum of squares by head, float64."""
    return x.double().square().sum((0, 2))
