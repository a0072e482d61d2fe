"""What codecs do to layers of every kind, by numpy: with windows and capped scores, those that read another's cache,
keys that are made of values."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_fidelity import SMALL, ids, own_folder  # noqa: F401
from test_verify import random_model

from kvist.cache.calibration import Calibration, save_calibration
from kvist.cache.choice import parse_choice
from kvist.cache.layout import StreamLayout
from kvist.cache.spec import Reading, Window
from kvist.evals.calibrate import CalibrationReport, calibrate
from kvist.evals.verify import Verifier
from kvist.models.config import ModelConfig
from kvist.models.families import read_config
from kvist.models.load import randomize
from kvist.service.calibration import Vectors, calibration_path, observe
from kvist.service.loaded import Loaded
from kvist.service.vectors import VectorMeter, decoded
from oracle import LATENT, SHARED_AND_TIED

TOKENS = 230
CAPPED = {
    "model_type": "gemma2",
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "sliding_window": 90,
    "attn_logit_softcapping": 1.5,
}
KINDS = {
    "apart": SMALL,
    "capped": CAPPED,
    "shared and tied": SHARED_AND_TIED,
    "latent": LATENT,
}


@pytest.fixture(params=list(KINDS))
def base(request: pytest.FixtureRequest) -> Loaded:
    found = KINDS[request.param]
    loaded = random_model(found if isinstance(found, ModelConfig) else read_config(found, "test"))
    for name, parameter in randomize(loaded.model, seed=3, std=0.1).named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data *= 0.05  # there is no other scale of q.k
    return loaded


def proposed(base: Loaded, threshold: float = 0.97) -> tuple[Calibration, CalibrationReport]:
    calibration, report = calibrate(base, ids(TOKENS), "random", threshold)
    save_calibration(calibration_path(calibration.model), calibration)
    return calibration, report


def observed(base: Loaded) -> dict[int, Vectors]:
    seen: dict[int, Vectors] = {}
    observe(base.model, ids(TOKENS), seen.__setitem__)
    return seen


def keys_of(seen: Vectors, streams: Sequence[torch.Tensor]) -> torch.Tensor:
    first, last = streams[0], streams[-1]
    match seen.spec.reading:
        case Reading.APART:
            return first
        case Reading.JOINED:
            return torch.cat((last, first), -1)
        case Reading.TIED:
            assert seen.tie is not None
            return seen.tie.keys(last, torch.arange(len(last)))


def by_hand(seen: Vectors, coding: dict[int, StreamLayout]) -> tuple[float, float]:
    """Correlation of scores and what outputs keep, worst heads; `coding` of streams by place, others stay."""
    coded = [decoded(coding[i], x, 64) if i in coding else x[:192] for i, x in enumerate(seen.streams)]
    sides = [(keys_of(seen, streams), streams[-1]) for streams in (seen.streams, coded)]
    window = seen.spec.retention.size if isinstance(seen.spec.retention, Window) else TOKENS
    cap, correlations, outputs = seen.spec.softcap, [], []
    for head in range(seen.q.shape[1]):
        group = head * seen.v.shape[1] // seen.q.shape[1]
        (k, v), (k2, v2) = ([x[:, group].double().numpy() for x in side] for side in sides)
        scores: list[list[np.ndarray]] = [[], []]
        found: list[list[np.ndarray]] = [[], []]
        for position in range(64, TOKENS):
            earlier, first = position // 64 * 64, max(0, position - window + 1)
            for which, (keys, values) in enumerate(((k, v), (k2, v2))):
                mixed = [
                    np.concatenate([x[:earlier], y[earlier : position + 1]])[first:]
                    for x, y in ((keys, k), (values, v))
                ]
                logits = seen.scale * mixed[0] @ seen.q[position, head].double().numpy()
                logits = cap * np.tanh(logits / cap) if cap else logits
                behind = logits[: max(0, earlier - first)]
                scores[which].append(behind - behind.mean() if len(behind) else behind)
                weights = np.exp(logits - logits.max())
                found[which].append(weights @ mixed[1] / weights.sum())
        correlations.append(np.corrcoef(*map(np.concatenate, scores))[0, 1])
        error = signal = 0.0
        for start in range(0, TOKENS - 64, 64):
            x, y = (np.array(one[start : start + 64]) for one in found)
            x, y = x - x.mean(0), y - y.mean(0)
            error, signal = error + ((x - y) ** 2).sum(), signal + (x**2).sum()
        outputs.append(1 - error / signal)
    return min(correlations), min(outputs)


def test_numbers_of_candidates(base: Loaded) -> None:
    report, seen = proposed(base)[1], observed(base)
    layout, specs = base.with_kv("turbo3").layout, base.config.layer_specs()
    assert list(seen) == list(range(len(specs)))
    assert [layer.layer for layer in report.layers] == [n for n, spec in enumerate(specs) if spec.source is None]
    for layer in report.layers:
        assert layer.readers == [n for n, spec in enumerate(specs) if spec.source == layer.layer]
        for place, stream in enumerate(layout.layers[layer.layer].streams):
            found = next(one for one in layer.streams[stream.stream.name].tried if one.codec == "turbo3")
            numbers = [by_hand(seen[n], {place: stream}) for n in (layer.layer, *layer.readers)]
            assert found.output == pytest.approx(min(output for _, output in numbers), abs=1e-5)
            if stream.stream.name == "v":
                assert found.correlation is None
            else:
                assert found.correlation == pytest.approx(min(scores for scores, _ in numbers), abs=1e-5)


def test_vector_scores(base: Loaded) -> None:
    proposed(base)
    layout, seen = base.with_kv("turbo3").layout, observed(base)
    meter, errors, correlations = VectorMeter([layout]), [], []
    for layer, vectors in seen.items():
        meter.see(layer, vectors)
        source = vectors.spec.source
        coding = dict(enumerate(layout.layers[layer if source is None else source].streams))
        correlations.append(by_hand(vectors, coding)[0])
        if source is None:
            whole = [x[:192] for x in vectors.streams]
            coded = [decoded(coding[i], x, 64) for i, x in enumerate(whole)]
            k, k2 = (keys_of(vectors, streams).double() for streams in (whole, coded))
            of_keys = (k2 - k).square().sum((0, 2)) / (k - k.mean(0)).square().sum((0, 2))
            of_values = (coded[-1] - whole[-1]).square().sum((0, 2)) / whole[-1].square().sum((0, 2))
            errors.append(torch.stack([of_keys, of_values]))
    (score,) = meter.scores()
    assert score.logit_correlation_worst == pytest.approx(min(correlations), abs=1e-5)
    assert score.logit_correlation_layer == int(np.argmin(correlations))
    expected = torch.cat(errors, dim=1).mean(1).tolist()
    assert (score.distortion_k, score.distortion_v) == pytest.approx(expected, rel=1e-4)


def test_auto_is_sound_and_what_was_proposed(base: Loaded) -> None:
    calibration, report = proposed(base)
    auto = base.with_kv("auto")
    assert auto.layout.kv == report.proposal
    assert auto.layout.bytes_per_token == report.bytes_per_token
    choice = parse_choice(report.proposal)
    for layer in report.layers:
        assert calibration.streams[layer.layer].keys() == layer.streams.keys()
        for name, stream in layer.streams.items():
            assert choice.codec(layer.layer, name).name == stream.chosen.codec
            assert stream.chosen.quality >= 0.97
            assert (stream.mean is not None) == (name in ("k", "rope"))
    checks = list(Verifier(auto, length=200, steps=3, trials=1).run())
    assert [check for check in checks if not check.passed] == []
