"""Facts in, numbers out, in the format that Prometheus reads."""

import math
import threading
from collections import Counter

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvist.runtime.request import FinishReason
from kvist.server.metrics import Metrics
from kvist.service.facts import Cause, ChoiceDone, Explained, Fact, Load, Matched, RequestDone, StepDone

IDLE = Load(running=0, waiting=0, kv_blocks_used=0, kv_blocks_cached=0, kv_blocks=0)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(metrics: Metrics) -> Samples:
    """Every sample, as Prometheus' own parser reads it, by name (less the prefix) and labels."""
    text, kind = metrics.render()
    assert kind.startswith("text/plain; version=0.0.4")
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            assert sample.name.startswith("kvist:")
            key = sample.name.removeprefix("kvist:"), tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def observed(*facts: Fact) -> Samples:
    metrics = Metrics(lambda: IDLE)
    for fact in facts:
        metrics.observe(fact)
    return read(metrics)


def done(*choices: ChoiceDone, admitted: float | None = 12.0, first: float | None = 15.0) -> RequestDone:
    return RequestDone(100, choices, submitted=10.0, admitted=admitted, first_token=first, ended=23.0)


def test_what_was_computed_is_counted_by_why() -> None:
    samples = observed(Explained("evicted", 70, 69), Explained("evicted", 5, 0), Explained("new", 30, 0))
    assert value(samples, "prompt_tokens_computed_total", reason="evicted") == 75
    assert value(samples, "prompt_tokens_again_total", reason="evicted") == 69
    assert value(samples, "prompt_tokens_computed_total", reason="new") == 30
    assert value(samples, "prompt_tokens_again_total", reason="new") == 0


def test_names_are_those_that_people_know() -> None:
    names = {name for name, _ in observed()}
    known = {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "num_preemptions_total",
        "request_success_total",
    }
    histograms = {
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "iteration_tokens_total",
        "request_prompt_tokens",
        "request_generation_tokens",
    }
    assert known <= names
    assert {f"{name}{end}" for name in histograms for end in ("_bucket", "_count", "_sum")} <= names
    assert not any(name.endswith("_created") for name in names)


def test_the_load_is_read_once_for_each_answer_and_not_before() -> None:
    asked = []

    def load() -> Load:
        asked.append(1)
        return Load(running=3, waiting=2, kv_blocks_used=30, kv_blocks_cached=50, kv_blocks=120)

    metrics = Metrics(load)
    assert not asked
    samples = read(metrics)
    assert len(asked) == 1
    assert value(samples, "num_requests_running") == 3
    assert value(samples, "num_requests_waiting") == 2
    assert value(samples, "kv_cache_usage_perc") == 0.25
    states = {state: value(samples, "kv_blocks", state=state) for state in ("used", "cached", "free")}
    assert states == {"used": 30, "cached": 50, "free": 40}


def test_hits_are_counted_by_their_cause() -> None:
    samples = observed(
        Matched(Cause.PROMPT, 100, 64),
        Matched(Cause.PROMPT, 50, 0),
        Matched(Cause.FORK, 100, 99),
        Matched(Cause.RESUME, 130, 128),
    )
    for cause, looked, found in [("prompt", 150, 64), ("fork", 100, 99), ("resume", 130, 128)]:
        assert value(samples, "prefix_cache_queries_total", cause=cause) == looked
        assert value(samples, "prefix_cache_hits_total", cause=cause) == found


def test_a_request_is_taken_apart_into_its_times() -> None:
    samples = observed(done(ChoiceDone(5, FinishReason.STOP), ChoiceDone(3, FinishReason.LENGTH)))
    for name, seconds in [
        ("e2e_request_latency", 13.0),
        ("request_queue_time", 2.0),
        ("request_prefill_time", 3.0),
        ("request_decode_time", 8.0),
        ("request_time_per_output_token", 8.0 * 2 / 6),
    ]:
        assert value(samples, f"{name}_seconds_count") == 1
        assert value(samples, f"{name}_seconds_sum") == pytest.approx(seconds)
    assert value(samples, "prompt_tokens_total") == 100  # once, however many choices
    assert value(samples, "request_prompt_tokens_sum") == 100
    assert value(samples, "request_generation_tokens_count") == 2
    assert value(samples, "request_generation_tokens_sum") == 8
    ends = {
        reason.value: value(samples, "request_success_total", finished_reason=reason.value) for reason in FinishReason
    }
    assert ends == {"stop": 1, "length": 1, "cancelled": 0, "failed": 0}


def test_a_request_that_did_not_come_far_has_only_the_times_it_had() -> None:
    never = done(ChoiceDone(0, FinishReason.CANCELLED), admitted=None, first=None)
    admitted = done(ChoiceDone(0, FinishReason.FAILED), first=None)
    single = done(ChoiceDone(1, FinishReason.STOP))
    samples = observed(never, admitted, single)
    assert value(samples, "request_queue_time_seconds_sum") == 13.0 + 2.0 + 2.0
    assert value(samples, "request_prefill_time_seconds_count") == 1
    assert value(samples, "request_time_per_output_token_seconds_count") == 0
    assert value(samples, "request_success_total", finished_reason="cancelled") == 1
    assert value(samples, "request_success_total", finished_reason="failed") == 1


@given(st.lists(st.lists(st.floats(1e-6, 5000), max_size=5).map(tuple), max_size=10))
def test_steps_fill_the_buckets(gaps: list[tuple[float, ...]]) -> None:
    steps = [
        StepDone(
            tokens=7, sequences=2, seconds=0.25, drawn=len(gap) + 1, preempted=len(gap) % 2, first=(1.5,), gaps=gap
        )
        for gap in gaps
    ]
    samples = observed(*steps)
    count, every = len(steps), sum(gaps, ())
    assert value(samples, "generation_tokens_total") == len(every) + count
    assert value(samples, "num_preemptions_total") == sum(len(gap) % 2 for gap in gaps)
    assert value(samples, "iteration_tokens_total_sum") == 7 * count
    assert value(samples, "iteration_sequences_sum") == 2 * count
    assert value(samples, "iteration_seconds_sum") == 0.25 * count
    assert value(samples, "time_to_first_token_seconds_count") == count
    assert value(samples, "time_to_first_token_seconds_bucket", le="1.0") == 0
    assert value(samples, "time_to_first_token_seconds_bucket", le="2.0") == count
    bounds = [labels for name, labels in samples if name == "inter_token_latency_seconds_bucket"]
    assert len(bounds) > 10
    for ((_, bound),) in bounds:
        below = sum(gap <= float(bound) for gap in every)
        assert value(samples, "inter_token_latency_seconds_bucket", le=bound) == below
    assert value(samples, "inter_token_latency_seconds_sum") == pytest.approx(math.fsum(every))


def test_responses_are_counted_by_route_and_status() -> None:
    metrics = Metrics(lambda: IDLE)
    answers = ["/v1/messages 200", "/v1/messages 200", "/v1/messages 400", "/health 200"]
    for answer in answers:
        route, status = answer.split()
        metrics.answered(route, int(status))
    samples = read(metrics)
    for answer, times in Counter(answers).items():
        route, status = answer.split()
        assert value(samples, "http_requests_total", route=route, status=status) == times


def test_threads_do_not_lose_a_count() -> None:
    metrics = Metrics(lambda: IDLE)
    step = StepDone(tokens=3, sequences=1, seconds=0.1, drawn=2, gaps=(0.1, 0.2))

    def work() -> None:
        for _ in range(500):
            metrics.observe(step)
            metrics.answered("/health", 200)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.render()
    samples = read(metrics)
    assert value(samples, "generation_tokens_total") == 4000
    assert value(samples, "inter_token_latency_seconds_count") == 4000
    assert value(samples, "iteration_tokens_total_sum") == 6000
    assert value(samples, "http_requests_total", route="/health", status="200") == 2000


def test_nothing_is_shared_between_two_of_them() -> None:
    first, second = Metrics(lambda: IDLE), Metrics(lambda: IDLE)
    first.observe(Matched(Cause.PROMPT, 10, 5))
    assert value(read(second), "prefix_cache_queries_total", cause="prompt") == 0
    assert b"kvist:" not in prometheus_client.generate_latest()
