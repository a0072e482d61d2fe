"""What fidelity measures is what it says: against oracles, against itself, and on codecs that are worse on purpose."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvist.base.errors import RequestError, TextError
from kvist.cache.codecs import codec, paper
from kvist.cache.layout import plan_layout
from kvist.cache.spec import key_value
from kvist.evals import tradeoff
from kvist.evals.fidelity import FidelityReport, compare, run, summarize, windows
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.linear import weights_of
from kvist.models.load import build, randomize
from kvist.models.plain import CodedPlainView
from kvist.service import calibration as calibration_module
from kvist.service.calibration import TEXT, Vectors, built_in_text, observe
from kvist.service.loaded import Loaded, open_model, select_backend
from kvist.service.vectors import Agreement, VectorMeter, compare_outputs, decoded
from kvist.text.tokenizer import Tokenizer

SMALL = ModelConfig(
    family="qwen2",
    vocab_size=61,
    hidden_size=96,
    intermediate_size=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    max_positions=512,
    norm_eps=1e-6,
    activation=Activation.SILU,
    rope=Rope(1e6),
    qkv_bias=True,
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are kept here; kernels where they always are."""
    monkeypatch.setattr(calibration_module, "writable_cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bundled() -> Loaded:
    return open_model(None)


def random_model(shift: float = 0.0) -> Loaded:
    """Random weights; keys share a mean of about `shift` in the channels that turn slowest with position."""
    backend = select_backend(SMALL, torch.float32)
    model = randomize(build(SMALL, backend, torch.float32), seed=3, std=0.1)
    heads, dim, slow = SMALL.heads, SMALL.head_dim, SMALL.head_dim // 8
    for block in model.blocks:
        keys = block.attention.qkv.bias.data.unflatten(0, (-1, dim))[heads : heads + SMALL.kv_heads]
        keys[:, dim // 2 - slow : dim // 2] += shift
        keys[:, -slow:] -= shift
    return Loaded("random", SMALL, model, plan_layout(SMALL.layer_specs(), codec("fp32")), backend, Path("none"))


def ids(count: int) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(5)).tolist()


def measured(base: Loaded, kvs: Sequence[str], parts: Sequence[list[int]]) -> FidelityReport:
    report = run(base, {kv: base.with_kv(kv) for kv in kvs}, "random", parts)
    assert report is not None
    return report


def text_windows(base: Loaded, tokens: int) -> list[list[int]]:
    return windows(base, built_in_text(base.tokenizer()), tokens, 512)


def test_divergence_of_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.2, 0.3, 0.5])
    found = compare(torch.tensor(np.log(p))[None].float(), torch.tensor(np.log(q) + 7)[None].float(), torch.tensor([1]))
    expected = [(p * np.log(p / q)).sum(), math.log(0.25 / 0.3), 0.0, 0.3 - 0.25]
    assert found.dtype == torch.float64
    assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-7)


def test_rows_are_compared_in_order_however_many() -> None:
    logits, other = torch.randn(2, 150, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(150) % 9
    alone = [compare(logits[i : i + 1], other[i : i + 1], targets[i : i + 1]) for i in range(150)]
    assert torch.equal(compare(logits, other, targets), torch.cat(alone, dim=1))
    assert compare(logits[:0], other[:0], targets[:0]).shape == (4, 0)


def test_summary_of_known_numbers() -> None:
    log_ratio = np.random.Generator(np.random.PCG64(1)).normal(0.02, 0.3, 4000)
    divergence = np.linspace(0, 1, 4000)
    same, delta = np.arange(4000) % 4 > 0, np.where(np.arange(4000) % 2, 0.1, -0.1)
    found = summarize(torch.tensor(np.stack([divergence, log_ratio, same, delta])))
    assert found.ppl_ratio == pytest.approx(np.exp(log_ratio.mean()))
    # The delta method against resampling.
    resampled = np.random.Generator(np.random.PCG64(2)).choice(log_ratio, (2000, 4000)).mean(1)
    assert found.ppl_ratio_error == pytest.approx(np.exp(resampled).std(), rel=0.05)
    assert (found.kld_mean, found.kld_median, found.kld_max) == pytest.approx((0.5, 0.5, 1.0))
    assert (found.kld_p99, found.kld_p999) == pytest.approx((0.99, 0.999))
    assert (found.same_top1, found.delta_p_rms) == pytest.approx((0.75, 0.1))


def test_full_precision_against_itself_is_exactly_nothing(bundled: Loaded) -> None:
    parts = text_windows(bundled, 700)
    report = measured(bundled, ["fp32"], parts)
    assert [len(part) for part in parts] == [512, 188]
    assert report.tokens == 700
    # Behind a whole block, and with a next token.
    assert report.predictions == 512 - 65 + 188 - 65
    (row,) = report.rows
    found, vectors = row.divergence, row.vectors
    assert found.kld_max == found.kld_mean == found.ppl_ratio_error == found.delta_p_rms == 0.0
    assert found.same_top1 == found.ppl_ratio == 1.0
    assert vectors.distortion == vectors.bias == 0.0
    assert vectors.logit_correlation_worst == 1.0
    assert 1 < report.base_ppl < 65


def test_more_bits_lose_less(bundled: Loaded) -> None:
    report = measured(bundled, ["turbo2", "turbo4", "int8", "turbo3"], text_windows(bundled, 512))
    assert [row.kv for row in report.rows] == ["int8", "turbo4", "turbo3", "turbo2"]
    sizes = [row.bytes_per_token for row in report.rows]
    assert sizes == [1056, 544, 416, 288]
    for better, worse in itertools.pairwise(report.rows):
        assert better.divergence.kld_mean < worse.divergence.kld_mean
        assert better.divergence.delta_p_rms < worse.divergence.delta_p_rms
        assert better.vectors.distortion_k < worse.vectors.distortion_k
        assert better.vectors.distortion_v < worse.vectors.distortion_v
        assert better.vectors.logit_correlation_worst > worse.vectors.logit_correlation_worst
    assert report.rows[0].divergence.same_top1 > 0.99
    assert all(abs(row.vectors.bias) < 0.01 for row in report.rows)


def test_a_codec_broken_on_purpose_is_seen(bundled: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = text_windows(bundled, 200)
    sound = measured(bundled, ["paper-mse4"], parts).rows[0]
    unpack = paper.unpack_bits

    def constant(packed: Tensor, bits: int, count: int) -> Tensor:
        return torch.full_like(unpack(packed, bits, count), 3)

    monkeypatch.setattr(paper, "unpack_bits", constant)
    broken = measured(bundled, ["paper-mse4"], parts).rows[0]
    assert broken.divergence.kld_mean > 20 * sound.divergence.kld_mean
    assert broken.divergence.same_top1 < sound.divergence.same_top1
    assert sound.vectors.logit_correlation_worst > 0.98
    assert broken.vectors.logit_correlation_worst < 0.5
    assert broken.vectors.distortion > 0.5 > sound.vectors.distortion


def test_a_codec_that_shrinks_is_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_model()
    monkeypatch.setattr(paper, "unpack_bits", paper.unpack_bits)
    decode = paper.PaperCodec.decode
    monkeypatch.setattr(paper.PaperCodec, "decode", lambda *arguments: decode(*arguments) * 0.9)
    row = measured(base, ["paper-mse4"], [ids(200)]).rows[0]
    # The paper's own codes shrink by their distortion, a hundredth.
    assert row.vectors.bias == pytest.approx(0.9 * (1 - 0.0095) - 1, abs=0.004)


def test_predictions_are_those_of_plain_attention_over_decoded_blocks() -> None:
    base, tokens = random_model(), ids(230)
    report = measured(base, ["k=turbo3,v=int4"], [tokens])
    layout = base.with_kv("k=turbo3,v=int4").layout

    def logits(views: Sequence[object]) -> Tensor:
        with torch.inference_mode():
            return base.model.logits(base.model(torch.tensor(tokens), torch.arange(len(tokens)), views)).double()

    exact = logits([CodedPlainView(64, lambda x: x, lambda x: x) for _ in layout.layers])
    other = logits(
        [
            CodedPlainView(64, lambda x, k=keys: decoded(k, x, 64), lambda x, v=values: decoded(v, x, 64))
            for keys, values in (layer.streams for layer in layout.layers)
        ]
    )
    p, q = exact[64:-1].log_softmax(-1), other[64:-1].log_softmax(-1)
    kld = float((p.exp() * (p - q)).sum(-1).mean())
    found = report.rows[0].divergence
    assert kld > 1e-4
    # The kernels round queries and weights to bytes.
    assert found.kld_mean == pytest.approx(kld, rel=0.15)
    target = torch.tensor(tokens[65:])[:, None]
    assert report.base_ppl == pytest.approx(float((-p.gather(-1, target).mean()).exp()), rel=1e-4)
    assert found.ppl_ratio == pytest.approx(float((p - q).gather(-1, target).mean().exp()), rel=0.02)
    same = (exact[64:-1].argmax(-1) == other[64:-1].argmax(-1)).double().mean()
    assert found.same_top1 == pytest.approx(float(same), abs=0.03)


def test_vector_scores_by_numpy() -> None:
    """Pair by pair, in float64: every query, every key of its earlier blocks."""
    base, parts = random_model(), [ids(200), ids(160)]
    layout = base.with_kv("k=int4,v=turbo2").layout
    meter, seen = VectorMeter([layout]), list[tuple[int, Vectors]]()
    for part in parts:
        observe(base.model, part, meter.see)
        observe(base.model, part, lambda layer, vectors: seen.append((layer, vectors)))
    worst, slopes, errors = [], [], []
    for layer, head in itertools.product(range(2), range(4)):
        pairs, error, energy = [], np.zeros(2), np.zeros(2)
        for vectors in (vectors for of, vectors in seen if of == layer):
            whole = len(vectors.k) // 64 * 64
            streams = zip(layout.layers[layer].streams, (vectors.k, vectors.v), strict=True)
            (k, k2), (v, v2) = (
                (x[:whole, head // 2].double().numpy(), decoded(stream, x, 64)[:, head // 2].double().numpy())
                for stream, x in streams
            )
            error += [((k2 - k) ** 2).sum(), ((v2 - v) ** 2).sum()]
            energy += [((k - k.mean(0)) ** 2).sum(), (v**2).sum()]
            for position, query in enumerate(vectors.q[:, head].double().numpy()):
                earlier = position // 64 * 64
                a, b = k[:earlier] @ query, k2[:earlier] @ query
                pairs.append(np.stack([a - a.mean(), b - b.mean()]) if earlier else np.zeros((2, 0)))
        a, b = np.concatenate(pairs, axis=1)
        worst.append((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        slopes.append((a * b).sum() / (a * a).sum() - 1)
        errors.append(error / energy)
    (score,) = meter.scores()
    assert score.logit_correlation_worst == pytest.approx(min(worst), abs=1e-6)
    assert score.logit_correlation_layer == int(np.argmin(worst)) // 4
    assert score.bias == pytest.approx(np.mean(slopes), abs=1e-6)
    assert (score.distortion_k, score.distortion_v) == pytest.approx(np.mean(errors, axis=0), rel=1e-4)
    assert score.distortion == pytest.approx((score.distortion_k + score.distortion_v) / 2)


def test_outputs_by_numpy() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(150, heads, 32, generator=generator) for heads in (4, 2, 2))
    noise = torch.randn(2, 128, 2, 32, generator=generator) * 0.3
    (found,) = compare_outputs(Vectors(q, k, v, 0.2, key_value(2, 32)), [(k[:128] + noise[0], v[:128] + noise[1])], 64)
    for head in range(4):
        exact, coded = [], []
        for position in range(64, 150):
            earlier, group = position // 64 * 64, head // 2
            for outputs, (dk, dv) in ((exact, (0, 0)), (coded, noise[:, :earlier, group].double().numpy())):
                keys, values = (x[: position + 1, group].double().numpy().copy() for x in (k, v))
                keys[:earlier] += dk
                values[:earlier] += dv
                weights = np.exp(0.2 * keys @ q[position, head].double().numpy())
                outputs.append(weights @ values / weights.sum())
        a, b = (
            np.concatenate([part - part.mean(0) for part in (np.array(x)[:64], np.array(x)[64:])])
            for x in (exact, coded)
        )
        assert float(found.kept()[head]) == pytest.approx(1 - ((a - b) ** 2).sum() / (a**2).sum(), abs=1e-5)


def test_numbers_that_do_not_vary() -> None:
    still, moving = torch.zeros(1, 5), torch.arange(5.0)[None]
    assert Agreement.of(still, still).correlation().tolist() == [1.0]
    assert Agreement.of(still, moving).correlation().tolist() == [0.0]
    assert Agreement.of(moving, still).correlation().tolist() == [0.0]
    assert Agreement.of(still, moving).kept().tolist() == [0.0]
    assert Agreement.of(still, still).kept().tolist() == [1.0]


def test_keys_that_share_a_mean_need_centring() -> None:
    base = random_model(shift=12.0)
    centred = base.with_kv("turbo3")
    assert all(layer.streams[0].frame.mean.any() for layer in centred.layout.layers)
    specs = SMALL.layer_specs()
    uncentred = dataclasses.replace(centred, layout=plan_layout(specs, codec("turbo3"), full=base.layout.full))
    report = run(base, {"centred": centred, "uncentred": uncentred}, "random", [ids(320)])
    assert report is not None
    rows = {row.kv: row for row in report.rows}
    assert rows["uncentred"].bytes_per_token == rows["centred"].bytes_per_token
    assert rows["uncentred"].divergence.kld_mean > 10 * rows["centred"].divergence.kld_mean
    assert rows["uncentred"].vectors.logit_correlation_worst < 0.9
    assert rows["centred"].vectors.logit_correlation_worst > 0.97


def test_windows_begin_as_texts_begin(bundled: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    text = built_in_text(bundled.tokenizer())
    assert [len(part) for part in windows(bundled, text, 1000, 300)] == [300, 300, 300, 100]
    # A remainder without a prediction behind a coded block is left out.
    assert [len(part) for part in windows(bundled, text, 665, 300)] == [300, 300]
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: [9, *encode(self, text)])
    plain = windows(bundled, text, 301, 100)
    assert [part[0] for part in plain] == [
        9,
        encode(bundled.tokenizer(), text[99])[0],
        encode(bundled.tokenizer(), text[199])[0],
    ]
    load = Tokenizer.load.__func__

    def with_special(cls, directory):
        tokenizer = load(cls, directory)
        tokenizer.special_ids = frozenset([9])
        return tokenizer

    monkeypatch.setattr(Tokenizer, "load", classmethod(with_special))
    begun = windows(bundled, text, 298, 100)
    assert [part[0] for part in begun] == [9, 9, 9]
    assert begun[0][1:] + begun[1][1:] + begun[2][1:] == encode(bundled.tokenizer(), text)[:297]


def test_texts_and_lengths_that_will_not_do(bundled: Loaded) -> None:
    with pytest.raises(TextError, match="the text has 40 tokens; at least 66 are needed"):
        windows(bundled, "a" * 40, 1000, 500)
    with pytest.raises(RequestError, match="65 tokens hold no prediction behind a coded block of 64; 66 would"):
        windows(bundled, "a" * 400, 1000, 65)
    with pytest.raises(RequestError, match="windows of 1,025 tokens do not fit the model's context of 1,024"):
        windows(bundled, "a" * 4000, 4000, 1025)
    assert len(windows(bundled, "a" * 66, 1000, 500)[0]) == 66


def test_only_as_much_of_a_text_is_tokenized_as_is_needed(bundled: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: seen.append(len(text)) or encode(self, text))
    windows(bundled, "abc " * 100_000, 100, 100)
    assert seen == [800]


def test_a_stop_leaves_what_is_measured(bundled: Loaded) -> None:
    parts, others = text_windows(bundled, 1024), {"turbo4": bundled.with_kv("turbo4")}
    assert len(parts) == 2
    assert run(bundled, others, "x", parts, stop=lambda: True) is None
    asked = iter([False, True, True])
    report = run(bundled, others, "x", parts, stop=lambda: next(asked))
    assert report is not None
    # One step of the widest, 512 tokens, of two windows.
    assert (report.tokens, report.predictions) == (512, 512 - 65)


def test_packed_weights(bundled: Loaded) -> None:
    """Against the same weights as they were, over the same cache."""
    packed = [open_model(None, weights=weights) for weights in ("int8", "int4")]
    report = run(bundled, {}, "some.txt", text_windows(bundled, 400), packed=packed)
    assert report is not None
    assert report.rows == []
    eight, four = report.packed
    assert (eight.weights, four.weights) == ("int8", "int4")
    assert 8 < eight.bits_per_weight < 8.5
    assert 4.4 < four.bits_per_weight < 4.7
    assert 0.005 < eight.loss < 0.01 < 0.07 < four.loss < 0.1
    assert 0 < eight.divergence.kld_mean < 0.001 < four.divergence.kld_mean < 0.03
    assert eight.nbytes == sum(weight.codes.nbytes for weight in weights_of(packed[0].model).values())
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    for key in json.loads(json.dumps(report.to_json()))["packed"][0]:
        assert f"`{key}`" in documented
    unchanged = run(bundled, {}, "some.txt", text_windows(bundled, 200), packed=[bundled])
    assert unchanged is not None
    assert unchanged.packed[0].divergence.kld_max == 0


def test_report_and_picture(bundled: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = list[str]()
    others = {kv: bundled.with_kv(kv) for kv in ("int4", "int4-rot", "turbo4", "k=turbo4,v=turbo3", "fp32")}
    report = run(bundled, others, "some.txt", text_windows(bundled, 200), heard.append)
    assert report is not None
    assert "window 1 of 1, turbo4" in heard
    answer = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert {"model", "base", "text", "tokens", "predictions", "rows"} <= set(answer)
    assert (answer["model"], answer["base"], answer["base_bytes_per_token"]) == ("kvist-shakespeare", "fp32", 4096)
    documented = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    assert answer["packed"] == []
    for key in {*answer, *answer["rows"][0]}:
        assert f"`{key}`" in documented
    taken, free = [], tradeoff._free

    def recorded(*arguments):
        for reach, box in free(*arguments):
            taken.append(box)
            yield reach, box

    monkeypatch.setattr(tradeoff, "_free", recorded)
    assert tradeoff.plot(report, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert len(taken) == 4, "a name for each point, none for the one without an error"
    assert not any(one.overlaps(other) for one, other in itertools.combinations(taken, 2))
    nothing = dataclasses.replace(report, rows=[row for row in report.rows if row.kv == "fp32"])
    assert not tradeoff.plot(nothing, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_the_built_in_text_fits_a_vocabulary_of_letters(bundled: Loaded) -> None:
    whole, known = TEXT.read_text("utf-8"), built_in_text(bundled.tokenizer())
    assert "/" in whole
    assert "/" not in known
    assert len(known) > 0.9 * len(whole)
    assert set(known) < set(whole)
