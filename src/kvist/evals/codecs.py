"""What codecs do to vectors drawn at random: bits, distortion, bias; and when centring and each rule of scaling pay.

Directions are uniformly random, as the theory of arXiv 2504.19874 has them after its rotation. Nothing here is a
model's keys or values; what a codec costs a model is another measurement.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.cache.codecs import Codec, bits_per_value, codec
from kvist.cache.layout import BLOCK_SIZE
from kvist.cache.spec import Role, Stream
from kvist.ops.coding import Frame, Rule, decode, encode

SHIFT = 10.0  # the mean of shifted keys, over the root of their mean squared deviation from it
PRODUCTS, QUERIES = 1024, 64  # vectors y beside which products are taken; queries of each head
VALUES = 8_192  # coded for each comparison of rules
# Values that one output averages, and the part of their energy that all of them share.
AVERAGES = ((1, 0.0), (16, 0.5), (256, 0.1))


@dataclass(frozen=True)
class Distortion:
    """One codec on unit vectors x of `dim` numbers, decoded x̂. `bits`: of a number, everything counted.

    `key_error`, `value_error`: mean |x̂ - x|^2 as keys and as values. `product_error`: dim * mean <y, x̂ - x>^2 of keys
    with independent random unit y. `bias`: mean <y, x̂> / <y, x> - 1 of keys with y at 45 degrees to x;
    `bias_deviation`: its standard error.
    """

    codec: str
    dim: int
    bits: float
    key_error: float
    value_error: float
    product_error: float
    bias: float
    bias_deviation: float


@dataclass(frozen=True)
class LogitCorrelation:
    """Of <q, k> over keys before and after a codec, mean over random queries, for keys whose mean is ten times as long
    as what differs between them: as coded, and coded less their mean."""

    codec: str
    dim: int
    plain: float
    centred: float


@dataclass(frozen=True)
class ValueRules:
    """Squared error, relative, of the mean of `tokens` values that share the part `shared` of their energy, under the
    two rules that scale a segment."""

    codec: str
    dim: int
    tokens: int
    shared: float
    unbiased: float
    least_squares: float


@dataclass(frozen=True)
class Report:
    """`to_json` is documented in docs/codecs.md."""

    samples: int
    distortions: list[Distortion]
    logits: list[LogitCorrelation]
    values: list[ValueRules]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def run(dims: Sequence[int], names: Sequence[str], samples: int, observe: Callable[[str], None]) -> Report:
    """Each codec of `names` in heads of each of `dims`, on `samples` vectors, rounded up to whole blocks.

    `observe` hears what is being measured. The same numbers every time on one machine. Raises `ConfigError` for an
    unknown codec, or one that cannot hold such heads.
    """
    if samples < 1 or not dims or not names:
        raise ConfigError("a measurement needs a codec, a head size and at least one sample")
    report = Report(-(-samples // BLOCK_SIZE) * BLOCK_SIZE, [], [], [])
    for dim in dims:
        for of in map(codec, names):
            observe(f"{of.name}, heads of {dim}")
            report.distortions.append(distortion(of, dim, report.samples))
            if of.centred:
                report.logits.append(logit_correlation(of, dim))
            coding = of.coding(Stream("v", Role.VALUES, 1, dim))
            if coding is not None and coding.rule in (Rule.UNBIASED, Rule.LEAST_SQUARES):
                report.values.extend(value_rules(of, dim, *average) for average in AVERAGES)
    return report


def distortion(of: Codec, dim: int, samples: int) -> Distortion:
    """On `samples` unit vectors, a multiple of the block size."""
    generator = torch.Generator().manual_seed(dim)
    heads = samples // BLOCK_SIZE
    x = _unit(BLOCK_SIZE, heads, dim, generator=generator)
    keys = Stream("k", Role.KEYS, heads, dim)
    bits = bits_per_value(of, keys, BLOCK_SIZE)
    key_error = _round_trip(of, x, keys) - x
    value_error = _round_trip(of, x, Stream("v", Role.VALUES, heads, dim)) - x
    products = key_error.flatten(0, 1) @ _unit(PRODUCTS, dim, generator=generator).T
    beside = torch.randn(x.shape, generator=generator)
    beside -= (beside * x).sum(-1, keepdim=True) * x
    aside = x + beside / beside.norm(dim=-1, keepdim=True)  # <aside, x> = 1
    bias = (key_error * aside).sum(-1).double()
    return Distortion(
        of.name,
        dim,
        bits,
        key_error=_mean_square(key_error),
        value_error=_mean_square(value_error),
        product_error=dim * float(products.square().mean(dtype=torch.float64)),
        bias=float(bias.mean()),
        bias_deviation=float(bias.std()) / samples**0.5,
    )


def logit_correlation(of: Codec, dim: int, heads: int = 16) -> LogitCorrelation:
    """Over 16 blocks of keys in each of `heads` heads, each with a mean of its own."""
    generator = torch.Generator().manual_seed(dim)
    mean = _unit(heads, dim, generator=generator) * (SHIFT * dim**0.5)
    keys = torch.randn(16, BLOCK_SIZE, heads, dim, generator=generator) + mean
    queries = torch.randn(QUERIES, heads, dim, generator=generator)
    stream, plain = Stream("k", Role.KEYS, heads, dim), Frame.plain(heads, dim)

    def correlation(frame: Frame) -> float:
        coded = torch.cat([_round_trip(of, block, stream, frame) for block in keys])
        exact, found = (_standard(torch.einsum("thd,qhd->hqt", k, queries)) for k in (keys.flatten(0, 1), coded))
        return float((exact * found).mean())

    return LogitCorrelation(of.name, dim, correlation(plain), correlation(replace(plain, mean=mean)))


def value_rules(of: Codec, dim: int, tokens: int, shared: float) -> ValueRules:
    """Averages of `tokens` of `VALUES` values each, coded by a codec whose values have one of the two rules."""
    generator, heads = torch.Generator().manual_seed(tokens), VALUES // tokens
    common = torch.randn(heads, dim, generator=generator) * shared**0.5
    values = torch.randn(tokens, heads, dim, generator=generator) * (1 - shared) ** 0.5 + common
    frame, exact = Frame.plain(heads, dim), values.mean(0)
    coding = of.coding(Stream("v", Role.VALUES, heads, dim))
    assert coding is not None, f"{of.name} has no rule of scaling"
    errors = []
    for rule in (Rule.UNBIASED, Rule.LEAST_SQUARES):
        ruled = replace(coding, rule=rule)
        decoded = decode(*encode(values, ruled, frame), ruled, frame)
        errors.append(float(((decoded.mean(0) - exact) ** 2).sum() / (exact**2).sum()))
    return ValueRules(of.name, dim, tokens, shared, *errors)


def _round_trip(of: Codec, x: Tensor, stream: Stream, frame: Frame | None = None) -> Tensor:
    """One block `x` [B, heads, dim] coded and decoded."""
    frame = frame or Frame.plain(stream.heads, stream.dim)
    return of.decode(of.encode(x, stream, frame), stream, frame)


def _unit(*shape: int, generator: torch.Generator) -> Tensor:
    """Uniformly random unit vectors along the last axis."""
    x = torch.randn(shape, generator=generator)
    return x / x.norm(dim=-1, keepdim=True)


def _mean_square(error: Tensor) -> float:
    return float(error.double().square().sum(-1).mean())


def _standard(x: Tensor) -> Tensor:
    """Mean zero and variance one along the last axis."""
    x = x.double() - x.double().mean(-1, keepdim=True)
    return x / x.square().mean(-1, keepdim=True).sqrt()
