"""The bundled model recalls; a damaged cache makes it forget; the measures are what they are named."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_verify import LLAMA, random_model

from kvist.base.errors import RequestError
from kvist.cache.manager import Lease
from kvist.cache.store import Store
from kvist.cache.view import PagedView
from kvist.evals import recall as recall_eval
from kvist.evals.divergence import kl_divergences
from kvist.evals.recall import RecallEval, RecallReport, plot
from kvist.models.plain import PlainView
from kvist.runtime.feed import feed
from kvist.runtime.runner import Runner
from kvist.service.loaded import RECALL, Loaded, open_model
from kvist.text.recall import recall_batch


@pytest.fixture(scope="module")
def full() -> Loaded:
    return open_model(str(RECALL), kv="fp32")


@pytest.fixture(scope="module")
def measure(full: Loaded) -> RecallEval:
    torch.set_num_threads(1)
    return RecallEval(full, lengths=(128, 1024), questions=384, seed=1)


@pytest.mark.parametrize("kv", ["fp32", "bf16"])
def test_the_bundled_model_recalls_what_lies_in_its_cache(kv: str, measure: RecallEval) -> None:
    row = measure.score(open_model(str(RECALL), kv=kv), kv)
    assert row.bits_per_value == {"fp32": 32, "bf16": 16}[kv]
    # Two layers, keys and values of two heads of 64 numbers.
    assert row.bytes_per_token == 2 * 2 * 2 * 64 * row.bits_per_value / 8
    assert [part.length for part in row.by_length] == [128, 1024]
    assert [part.pairs for part in row.by_length] == [16, 128]
    assert [part.cached_tokens for part in row.by_length] == [95, 767]
    assert all(part.score.accuracy >= 0.99 for part in row.by_length)
    assert row.score.same_top1 >= 0.99
    if kv == "fp32":
        assert row.score.kld_max == row.score.kld_mean == 0.0
    else:
        assert 0 < row.score.kld_mean <= row.score.kld_p999 <= row.score.kld_max < 1


def test_every_question_is_counted_once_at_its_depth(full: Loaded, measure: RecallEval) -> None:
    row = measure.score(full, "fp32")
    assert row.score.questions == 2 * 384
    for part in [row, *row.by_length]:
        assert sum(depth.score.questions for depth in part.by_depth) == part.score.questions
        right = sum(depth.score.accuracy * depth.score.questions for depth in part.by_depth)
        assert right == pytest.approx(part.score.accuracy * part.score.questions)
    assert [(depth.start, depth.end) for depth in row.by_depth] == [(i / 8, (i + 1) / 8) for i in range(8)]


def test_answers_are_those_of_plain_attention(full: Loaded, measure: RecallEval) -> None:
    batch = recall_batch(2, 256, 32, torch.Generator().manual_seed(8))
    ours = recall_eval._ask(full.engine(full.room(256)).runner, batch)
    assert ours.cached_tokens == 191
    with torch.inference_mode():
        for row, logits in zip(batch.tokens, ours.logits, strict=True):
            views = [PlainView() for _ in range(2)]
            theirs = full.model.logits(full.model(row, torch.arange(256), views))[batch.questions]
            torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)


def test_noise_in_the_cache_is_forgetting(full: Loaded, measure: RecallEval, monkeypatch: pytest.MonkeyPatch) -> None:
    write, accuracies = PagedView.write, []
    for strength in (0.0, 0.5, 2.0):
        generator = torch.Generator().manual_seed(0)

        def noisy(self: PagedView, k: torch.Tensor, v: torch.Tensor) -> None:
            noise = torch.empty_like(k).normal_(generator=generator)  # noqa: B023
            write(self, k + strength * k.square().mean().sqrt() * noise, v)  # noqa: B023

        monkeypatch.setattr(PagedView, "write", noisy)
        row = measure.score(full, "noise")
        accuracies.append(row.score.accuracy)
        assert (row.score.kld_mean > 0) == (strength > 0)
    assert accuracies[0] > accuracies[1] + 0.01 > accuracies[2] + 0.3


def test_lost_blocks_are_forgotten_at_their_depth(
    full: Loaded, measure: RecallEval, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is read where the pairs lie: of 767 tokens 64 to 191 are lost, and with them the second eighth."""
    stores: list[Store] = []

    def losing(runner: Runner, lease: Lease, tokens: Sequence[int], logits: int = 0) -> torch.Tensor:
        if logits:
            stores.append(runner.store)
            for layer in range(2):
                for plane in runner.store.planes(layer):
                    plane[lease.table[1:3]] = 0
        return feed(runner, lease, tokens, logits)

    monkeypatch.setattr(recall_eval, "feed", losing)
    row = measure.score(full, "lost")
    assert stores
    long = row.by_length[1].by_depth
    assert long[1].score.accuracy < 0.1
    assert 0.4 < long[0].score.accuracy < 0.9
    assert min(depth.score.accuracy for depth in long[2:]) > 0.9


def test_divergences() -> None:
    base, other = (torch.empty(5, 40).normal_(generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = F.kl_div(
        other.double().log_softmax(-1), base.double().log_softmax(-1), reduction="none", log_target=True
    )
    torch.testing.assert_close(kl_divergences(base, other), expected.sum(-1))
    assert kl_divergences(base, base).tolist() == [0.0] * 5


def test_fed_in_pieces_the_last_logits_come_back(full: Loaded) -> None:
    runner = full.engine(full.room(1024, sequences=2)).runner
    tokens = recall_batch(1, 1024, 128, torch.Generator().manual_seed(2)).tokens[0].tolist()
    lease, twin = runner.manager.open(), runner.manager.open()
    whole = feed(runner, lease, tokens, len(tokens))
    assert feed(runner, twin, tokens[:700]).shape == (0, 512)
    assert torch.equal(feed(runner, twin, tokens[700:], 40), whole[-40:])
    assert lease.length == twin.length == 1024


def test_what_cannot_be_asked_is_refused(full: Loaded) -> None:
    with pytest.raises(RequestError, match=r"no recall model: its vocabulary has 61 tokens, the task's has 512"):
        RecallEval(random_model(LLAMA))
    with pytest.raises(RequestError, match="context of 1,024 tokens; 2,048 do not fit"):
        RecallEval(full, lengths=(128, 2048))
    with pytest.raises(RequestError, match="7 tokens do not hold 0 pairs"):
        RecallEval(full, lengths=(7,))


def test_json_and_picture(full: Loaded, measure: RecallEval, tmp_path: Path) -> None:
    row = measure.score(full, "fp32")
    report = RecallReport("some", [row, dataclasses.replace(row, kv="other")])
    answer = json.loads(json.dumps(report.to_json()))
    assert answer["model"] == "some"
    score = {"questions", "accuracy", "kld_mean", "kld_p99", "kld_p999", "kld_max", "same_top1"}
    assert set(answer["rows"][0]) == {"kv", "bits_per_value", "bytes_per_token", "by_length", "by_depth"} | score
    assert set(answer["rows"][0]["by_depth"][0]) == {"start", "end"} | score
    assert set(answer["rows"][1]["by_length"][0]) == {"length", "pairs", "cached_tokens", "by_depth"} | score
    plot(report, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
