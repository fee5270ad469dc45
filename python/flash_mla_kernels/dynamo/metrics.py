"""The engine's figures on the worker's /metrics, under flash-mla serve's names (docs/serving.md)."""

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_GAUGES = {
    "mla_sequences_running": ("running", "Sequences in the batch."),
    "mla_sequences_waiting": ("waiting", "Sequences in the queue."),
    "mla_cache_pages": ("pages_total", "Pages of 64 tokens in the cache."),
    "mla_cache_pages_used": ("pages_used", "Pages of running sequences."),
    "mla_cache_pages_cached": ("pages_cached", "Pages kept for prefix reuse only."),
}
_COUNTERS = {
    "mla_requests_submitted": ("requests_submitted", "Requests that entered the queue."),
    "mla_prompt_tokens": ("prompt_tokens", "Tokens of submitted prompts."),
    "mla_generated_tokens": ("generated_tokens", "Tokens generated."),
    "mla_prefix_tokens_looked_up": ("prefix_tokens_looked_up", "Prompt tokens looked up in the prefix cache."),
    "mla_prefix_tokens_hit": ("prefix_tokens_hit", "Prompt tokens found in the prefix cache."),
}
_ENDS = {"stop": "finished_stop", "length": "finished_length", "cancelled": "cancelled", "error": "failed"}


class _Collector:
    def __init__(self, stats):
        self._stats = stats

    def collect(self):
        stats = self._stats()
        for name, (field, what) in _GAUGES.items():
            yield GaugeMetricFamily(name, what, value=stats[field])
        for name, (field, what) in _COUNTERS.items():
            yield CounterMetricFamily(name, what, value=stats[field])
        ended = CounterMetricFamily("mla_continuations_finished", "Continuations by how they ended.", labels=["reason"])
        for reason, field in _ENDS.items():
            ended.add_metric([reason], stats[field])
        yield ended
        transfer = stats["transfer"]
        if transfer["role"] != "none":
            yield GaugeMetricFamily("mla_transfer_rooms_open", "Rooms now.", value=transfer["open"])
            yield CounterMetricFamily(
                "mla_transfer_handed_over", "Requests whose pages have been sent, or have come.", value=transfer["handed_over"]
            )
            fallbacks = CounterMetricFamily("mla_transfer_fallbacks", "Hand-overs that were none.", labels=["reason"])
            for reason, count in transfer["fallbacks"].items():
                fallbacks.add_metric([reason], count)
            yield fallbacks


def registry_of(stats):
    """A Prometheus registry over what ``stats()`` says at the time."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(stats))
    return registry
