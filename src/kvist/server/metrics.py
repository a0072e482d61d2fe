"""What a server counts, as Prometheus reads it. Names after the prefix are vLLM's where they mean the same.

| name | what it is |
|---|---|
| `num_requests_running`, `num_requests_waiting` | sequences that hold KV; those in the queue |
| `kv_cache_usage_perc` | blocks that live sequences hold, from 0 to 1 (as in vLLM, despite its name) |
| `kv_blocks{state}` | blocks: `used` by live sequences, `cached` (kept, given up when needed), `free` |
| `prefix_cache_queries_total{cause}` | tokens that were looked for in the cache |
| `prefix_cache_hits_total{cause}` | tokens of these that were not computed because the cache had them |
| `prefix_cache_tokens_total{tier}` | tokens of a prompt that were not computed, by where they were |
| `prompt_tokens_computed_total{reason}` | tokens of prompts that were computed, by why: `new`, `evicted`, ... |
| `prompt_tokens_again_total{reason}` | tokens of these that an earlier request had, too: paid again |
| `kept_blocks_read_total{tier}` | blocks read from the tiers behind the memory |
| `kept_blocks_written_total{tier}`, `kept_bytes_written_total{tier}` | written to them |
| `kept_losses_total{reason,tier}` | blocks that were there once and could not be had: `evicted`, `corrupt`, ... |
| `kept_failures_total{tier,act}` | reads and writes that a tier refused, or took too long for |
| `kept_bytes`, `kept_blocks` | what lies on disk now |
| `prompt_tokens_total`, `generation_tokens_total` | tokens of prompts, found in the cache or not; tokens drawn |
| `num_preemptions_total` | sequences that had to make room |
| `request_success_total{finished_reason}` | choices that ended: `stop`, `length`, `cancelled`, `failed` |
| `http_requests_total{route,status}` | responses |
| `time_to_first_token_seconds` | from submission to a choice's first token |
| `inter_token_latency_seconds` | from a choice's draw to its next |
| `request_time_per_output_token_seconds` | decode time of a request by its tokens after the first |
| `request_queue_time_seconds`, `request_prefill_time_seconds`, `request_decode_time_seconds` | where its time went |
| `e2e_request_latency_seconds` | from submission to the end |
| `request_prompt_tokens`, `request_generation_tokens` | of a request; of a choice |
| `iteration_tokens_total`, `iteration_sequences`, `iteration_seconds` | histograms of one step |

`cause`: `prompt`, a prefix shared with an earlier or a running request; `resume`, read again after a preemption;
`fork`, a further choice of the same request. The hit rate of a workload is that of `prompt`. What belongs to a request
is counted when it ends.
"""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from kvist.cache.disk import DiskTier
from kvist.cache.kept import ACTS, KeptCache
from kvist.cache.record import Loss
from kvist.cache.tier import MEMORY
from kvist.runtime.request import FinishReason
from kvist.service.facts import Cause, Explained, Fact, Load, Matched, RequestDone, StepDone

_PREFIX = "kvist:"
_SECONDS = tuple(float(f"{digit}e{power}") for power in range(-3, 4) for digit in (1, 2, 5))
_TOKENS = tuple(float(f"{digit}e{power}") for power in range(7) for digit in (1, 2, 5))


class Metrics:
    """Counts facts as they come, and reads `load` and the counters of `kept` when it is asked. Every method may be
    called from any thread."""

    def __init__(self, load: Callable[[], Load], kept: KeptCache | None = None) -> None:
        registry = CollectorRegistry()
        registry.register(_LoadGauges(load))
        if kept is not None and kept.tiers:
            registry.register(_KeptCounters(kept))
        self._registry = registry

        queries = _counter(registry, "prefix_cache_queries", "Tokens looked for in the prefix cache.", "cause")
        hits = _counter(registry, "prefix_cache_hits", "Tokens found in the prefix cache.", "cause")
        self._queries = {cause: queries.labels(cause.value) for cause in Cause}
        self._hits = {cause: hits.labels(cause.value) for cause in Cause}
        self._tiers = _counter(registry, "prefix_cache_tokens", "Tokens found in the prefix cache, by tier.", "tier")
        self._prompt_tokens = _counter(registry, "prompt_tokens", "Tokens of prompts, found in the cache or not.")
        self._computed = _counter(registry, "prompt_tokens_computed", "Tokens of prompts computed, by why.", "reason")
        self._again = _counter(registry, "prompt_tokens_again", "Of these, tokens paid again.", "reason")
        self._generation_tokens = _counter(registry, "generation_tokens", "Tokens drawn.")
        self._preemptions = _counter(registry, "num_preemptions", "Sequences that had to make room.")
        ended = _counter(registry, "request_success", "Choices that ended, by why.", "finished_reason")
        self._ended = {reason: ended.labels(reason.value) for reason in FinishReason}
        self._http = _counter(registry, "http_requests", "HTTP responses, by route and status.", "route", "status")

        self._first = _seconds(registry, "time_to_first_token", "From submission to a choice's first token.")
        self._gaps = _seconds(registry, "inter_token_latency", "From a choice's draw to its next.")
        self._per_token = _seconds(
            registry, "request_time_per_output_token", "Decode time of a request by its tokens after the first."
        )
        self._total = _seconds(registry, "e2e_request_latency", "From submission to the end.")
        self._queued = _seconds(registry, "request_queue_time", "From submission to admission, or to the end.")
        self._prefill = _seconds(registry, "request_prefill_time", "From admission to the first token.")
        self._decode = _seconds(registry, "request_decode_time", "From the first token to the end.")
        self._prompt = _tokens(registry, "request_prompt_tokens", "Tokens of a request's prompt.")
        self._generated = _tokens(registry, "request_generation_tokens", "Tokens drawn for a choice.")
        self._step_tokens = _tokens(registry, "iteration_tokens_total", "Tokens computed in a step.")
        self._step_sequences = _tokens(registry, "iteration_sequences", "Sequences in a step.")
        self._step_seconds = _seconds(registry, "iteration", "Time of a step.")

    def observe(self, fact: Fact) -> None:
        """Count a fact: about a microsecond for each number of it."""
        match fact:
            case StepDone():
                self._step(fact)
            case Matched():
                self._queries[fact.cause].inc(fact.tokens)
                self._hits[fact.cause].inc(fact.cached)
                for tier, tokens in fact.tiers.items():
                    self._tiers.labels(tier).inc(max(tokens, 0))
            case Explained():
                self._computed.labels(fact.reason).inc(fact.computed)
                self._again.labels(fact.reason).inc(fact.again)
            case RequestDone():
                self._request(fact)

    def answered(self, route: str, status: int) -> None:
        """Count a response. `route` is the pattern of the path that matched, never a client's own string."""
        self._http.labels(route, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and the content type of that."""
        return generate_latest(_WithoutDates(self._registry)), CONTENT_TYPE_PLAIN_0_0_4

    def _step(self, step: StepDone) -> None:
        self._step_tokens.observe(step.tokens)
        self._step_sequences.observe(step.sequences)
        self._step_seconds.observe(step.seconds)
        self._generation_tokens.inc(step.drawn)
        if step.preempted:
            self._preemptions.inc(step.preempted)
        for seconds in step.first:
            self._first.observe(seconds)
        for seconds in step.gaps:
            self._gaps.observe(seconds)

    def _request(self, request: RequestDone) -> None:
        self._prompt.observe(request.prompt_tokens)
        self._prompt_tokens.inc(request.prompt_tokens)
        self._total.observe(request.ended - request.submitted)
        self._queued.observe((request.ended if request.admitted is None else request.admitted) - request.submitted)
        for choice in request.choices:
            self._ended[choice.reason].inc()
            self._generated.observe(choice.new_tokens)
        if request.admitted is None or request.first_token is None:
            return
        self._prefill.observe(request.first_token - request.admitted)
        decode = request.ended - request.first_token
        self._decode.observe(decode)
        later = sum(max(choice.new_tokens - 1, 0) for choice in request.choices)
        if later:
            # Choices are drawn side by side: what one of them waits is the time by the tokens of one of them.
            self._per_token.observe(decode * len(request.choices) / later)


def _counter(registry: CollectorRegistry, name: str, what: str, *labels: str) -> Counter:
    return Counter(f"{_PREFIX}{name}", what, labels, registry=registry)


def _seconds(registry: CollectorRegistry, name: str, what: str) -> Histogram:
    return Histogram(f"{_PREFIX}{name}_seconds", what, registry=registry, buckets=_SECONDS)


def _tokens(registry: CollectorRegistry, name: str, what: str) -> Histogram:
    return Histogram(f"{_PREFIX}{name}", what, registry=registry, buckets=_TOKENS)


class _LoadGauges(Collector):
    """Gauges of one `Load`, read once for all of them."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not ask for the load."""
        return ()

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        yield _gauge("num_requests_running", "Sequences that hold KV.", load.running)
        yield _gauge("num_requests_waiting", "Sequences in the queue.", load.waiting)
        used = load.kv_blocks_used / load.kv_blocks if load.kv_blocks else 0.0
        yield _gauge("kv_cache_usage_perc", "KV blocks that live sequences hold, from 0 to 1.", used)
        blocks = GaugeMetricFamily(f"{_PREFIX}kv_blocks", "KV blocks, by what they are held for.", labels=["state"])
        blocks.add_metric(["used"], load.kv_blocks_used)
        blocks.add_metric(["cached"], load.kv_blocks_cached)
        blocks.add_metric(["free"], load.kv_blocks - load.kv_blocks_used - load.kv_blocks_cached)
        yield blocks


class _KeptCounters(Collector):
    """The counters of the kept cache, as they are."""

    def __init__(self, kept: KeptCache) -> None:
        self._kept = kept

    def describe(self) -> Iterable[Metric]:
        """Nothing, as above."""
        return ()

    def collect(self) -> Iterable[Metric]:
        found = self._kept.counters
        for name, what, counts in (
            ("kept_blocks_read", "Blocks read from a tier.", found.hits),
            ("kept_blocks_written", "Blocks written to a tier.", found.written),
            ("kept_bytes_written", "Bytes written to a tier.", found.written_bytes),
        ):
            yield _counted(name, what, ["tier"], {(tier.name,): counts[tier.name] for tier in self._kept.tiers})
        tiers = MEMORY, *(tier.name for tier in self._kept.tiers)
        losses = {(reason.value, tier): found.losses[tier, reason] for reason in Loss for tier in tiers}
        yield _counted("kept_losses", "Blocks that were there once and could not be had.", ["reason", "tier"], losses)
        acts = {(tier.name, act): found.failures[tier.name, act] for tier in self._kept.tiers for act in ACTS}
        yield _counted("kept_failures", "Reads and writes that a tier refused.", ["tier", "act"], acts)
        for tier in self._kept.tiers:
            if isinstance(tier, DiskTier):
                yield _gauge("kept_bytes", "Bytes of blocks on disk.", tier.used)
                yield _gauge("kept_blocks", "Blocks on disk.", len(tier))


def _counted(name: str, what: str, labels: list[str], counts: Mapping[tuple[str, ...], int]) -> Metric:
    metric = CounterMetricFamily(f"{_PREFIX}{name}", what, labels=labels)
    for values, count in counts.items():
        metric.add_metric(list(values), count)
    return metric


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", what, value)


class _WithoutDates(Collector):
    """A registry less the series that say when each of the others was made."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
