"""The sampler against a plain numpy one, and its random numbers against chance."""

import math

import numpy as np
import pytest
import torch

from kvist.base.errors import RequestError
from kvist.runtime.request import Request, Sampling
from kvist.runtime.sampler import Sampler, draw, probabilities, sample, uniform


def expected_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The definition, token by token, in float64. Ties go by id."""
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    weights = np.exp(scaled)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if sampling.top_p < 1 and reached >= sampling.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[order[0]]]
    result = np.zeros(len(logits))
    result[kept] = weights[kept] / weights[kept].sum()
    return result


SAMPLINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature in (0.1, 0.7, 1.0, 3.0)
    for top_k in (0, 1, 5, 1000)
    for top_p in (1.0, 0.93, 0.37, 1e-9)
    for min_p in (0.0, 0.07, 1.0)
]


@pytest.mark.parametrize("vocab", [1, 2, 17, 300])
def test_probabilities_are_those_of_the_definition(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    for sampling in SAMPLINGS:
        logits = rng.normal(0, 2, vocab).astype(np.float32)
        ours = probabilities(torch.from_numpy(logits), sampling).numpy()
        expected = expected_probabilities(logits, sampling)
        assert set(ours.nonzero()[0]) == set(expected.nonzero()[0]), sampling
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vocab", [3, 16, 17, 33, 301])
def test_equal_logits_keep_the_order_of_their_ids(vocab: int) -> None:
    """Logits of few values: a filter that cuts among equals keeps the lower ids, wherever they stand in a vector."""
    rng = np.random.default_rng(vocab)
    for sampling in SAMPLINGS:
        logits = rng.integers(-2, 3, vocab).astype(np.float32)
        ours = probabilities(torch.from_numpy(logits), sampling).numpy()
        expected = expected_probabilities(logits, sampling)
        assert set(ours.nonzero()[0]) == set(expected.nonzero()[0]), (sampling, logits)
    equal = torch.zeros(vocab)
    kept = probabilities(equal, Sampling(temperature=1.0, min_p=1.0))
    assert torch.equal(kept, torch.full((vocab,), 1 / vocab, dtype=torch.float64).to(kept))
    assert probabilities(equal, Sampling(temperature=1.0, top_k=2)).nonzero().flatten().tolist() == [0, 1]


def test_greedy_takes_the_first_of_the_largest() -> None:
    for vocab in (1, 9, 40, 1000):
        rng = np.random.default_rng(vocab)
        for _ in range(20):
            logits = torch.from_numpy(rng.integers(-3, 3, vocab).astype(np.float32))
            first = int((logits == logits.max()).nonzero()[0])
            assert sample(logits, Sampling(), 0) == first
            assert int(probabilities(logits, Sampling()).argmax()) == first
            assert float(probabilities(logits, Sampling())[first]) == 1.0


def test_extreme_temperatures_and_logits_give_a_distribution() -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, 2.9e38])
    assert probabilities(logits, Sampling(temperature=1e-30)).tolist() == [1.0, 0.0, 0.0, 0.0]
    flat = probabilities(torch.tensor([1.0, -1.0, 0.0]), Sampling(temperature=100.0))
    assert float(flat.sum()) == pytest.approx(1.0)
    assert float(flat.max() / flat.min()) == pytest.approx(math.exp(0.02))


def test_a_number_picks_its_place_in_the_cumulated_distribution() -> None:
    distribution = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    numbers = (0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-53)
    assert [draw(distribution, number) for number in numbers] == [1, 1, 3, 3, 4, 4]
    # Weights that do not quite sum to 1 are drawn from all the same.
    assert draw(distribution * 0.999, 1 - 2**-53) == 4
    assert draw(distribution * 1.001, 1 - 2**-53) == 4


# The 99.99th percentile of a chi-square distribution, by Wilson and Hilferty's cube: exceeded once in 10,000 tests.
def chi_square_limit(degrees: int) -> float:
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float((((counts - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.3, seed=5), Sampling(temperature=0.8, top_k=7, top_p=0.95, min_p=0.02, seed=6)]
)
def test_draws_follow_their_probabilities(sampling: Sampling) -> None:
    draws = 4000
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3))
    distribution = probabilities(logits, sampling).numpy()
    counts = np.bincount([sample(logits, sampling, position) for position in range(draws)], minlength=24)
    assert counts[distribution == 0].sum() == 0
    limit = chi_square_limit(int((distribution > 0).sum()) - 1)
    assert chi_square(counts, distribution) < limit
    # The same counts do not pass for a distribution that is warmer.
    warmer = Sampling(sampling.temperature * 1.5, sampling.top_k, sampling.top_p, sampling.min_p)
    assert chi_square(counts, probabilities(logits, warmer).numpy()) > limit


def test_random_numbers_are_uniform_and_independent_along_positions_and_seeds() -> None:
    along_positions = np.array([uniform(1, position) for position in range(4000)])
    along_seeds = np.array([uniform(seed, 1) for seed in range(4000)])
    for numbers in (along_positions, along_seeds):
        assert len(set(numbers)) == 4000
        assert 0 <= numbers.min() < numbers.max() < 1
        counts = np.bincount((numbers * 20).astype(int), minlength=20)
        assert chi_square(counts, np.full(20, 0.05)) < chi_square_limit(19)
        pairs = np.bincount((numbers[:-1] * 4).astype(int) * 4 + (numbers[1:] * 4).astype(int), minlength=16)
        assert chi_square(pairs, np.full(16, 1 / 16)) < chi_square_limit(15)
    assert uniform(2**64 - 1, 3) == uniform(2**64 - 1, 3) != uniform(2**64 - 1, 4)


@pytest.mark.parametrize(
    ("attempt", "finding"),
    [
        (lambda: Sampling(temperature=-0.1), r"temperature must be between 0 \(greedy\) and 100, got -0.1"),
        (lambda: Sampling(temperature=float("nan")), "temperature must be between"),
        (lambda: Sampling(top_k=-1), "top-k must be 0"),
        (lambda: Sampling(top_p=0.0), "top-p must be above 0 and at most 1, got 0.0"),
        (lambda: Sampling(top_p=1.1), "top-p must be"),
        (lambda: Sampling(min_p=1.5), "min-p must be between 0 and 1, got 1.5"),
        (lambda: Sampling(seed=-1), "a seed is a number from 0"),
        (lambda: Sampling(seed=2**64), "a seed is a number from 0"),
        (lambda: Request((), 1), "the prompt is empty"),
        (lambda: Request((1,), 0), "at least one new token must be asked for, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(attempt: object, finding: str) -> None:
    with pytest.raises(RequestError, match=finding):
        attempt()  # type: ignore[operator]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_is_drawn_before_the_least_tokens(temperature: float) -> None:
    logits = torch.tensor([9.0, 1.0, 8.0, 0.5])
    ends = (0, 2, 99)  # the vocabulary of a tokenizer may be larger than that of the logits
    sampler = Sampler(Sampling(temperature=temperature, seed=1), [1], ends=ends, min_tokens=3)
    for position in range(1, 4):
        token = sampler.draw(logits, position)
        assert token in (1, 3)
        sampler.accept(token)
    free = Sampler(Sampling(temperature=temperature, seed=1), [1])
    assert [sampler.draw(logits, position) for position in range(4, 40)] == [
        free.draw(logits, position) for position in range(4, 40)
    ]
    assert logits.tolist() == [9.0, 1.0, 8.0, 0.5]


def test_a_grammar_that_allows_an_end_alone_is_followed() -> None:
    class End:
        ended = False

        def forbid(self, logits: torch.Tensor) -> None:
            logits[1:] = -math.inf

        def accept(self, token: int) -> None: ...

    sampler = Sampler(Sampling(), [1], End(), ends=(0,), min_tokens=3)
    assert sampler.draw(torch.tensor([0.0, 5.0, 5.0]), 1) == 0
