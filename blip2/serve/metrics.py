"""The metrics at /metrics, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from blip2.serve.cache import ImageCache
from blip2.serve.connections import Activity

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one server, in a separate registry, so that two servers in one process do not mix.

    ``replica``: a label of every metric, if several servers answer at one address.
    """

    def __init__(self, replica: str | None = None) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica
        own: dict[str, Any] = {"registry": self.registry}
        self.running = Gauge("blip2_requests_running", "Requests whose answers are being generated", **own)
        self.waiting = Gauge("blip2_requests_waiting", "Requests waiting for rows in the batch", **own)
        self.rows = Gauge("blip2_rows", "Rows of the running batch; each beam is one", **own)
        self.num_unanswered = Gauge("blip2_requests_in_house", "Requests received and not yet answered", **own)
        self.request_seconds = Histogram(
            "blip2_request_seconds", "Time from the request's first byte to the answer's last",
            ["route", "status"], buckets=SECONDS, **own,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "blip2_time_to_first_token_seconds", "Time from entering the queue to the first token",
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.tokens = Counter("blip2_tokens", "Tokens of prompts and of generated texts", ["kind"], **own)
        self.batch_size = Histogram("blip2_batch_size", "Rows per decoding step", buckets=ROWS, **own)
        self.image_rejected = Counter("blip2_image_rejected", "Images that were refused", ["reason"], **own)
        self.requests_rejected = Counter(
            "blip2_requests_rejected", "Requests and connections refused or closed", ["reason"], **own
        )
        self.body_bytes = Gauge(
            "blip2_body_bytes", "Bytes of request bodies in memory", **own
        )

    def refuse(self, reason: str) -> None:
        """Count a refused request or connection, by a reason of a few words."""
        self.requests_rejected.labels(reason).inc()

    def follow_connections(self, count: Callable[[], Mapping[Activity, int]]) -> None:
        """Report the number of connections by state."""

        class ConnectionCollector(Collector):
            def collect(self) -> list[GaugeMetricFamily]:
                family = GaugeMetricFamily("blip2_connections", "Connections, by state", labels=["state"])
                found = count()
                for activity in Activity:
                    family.add_metric([activity.name.lower()], found.get(activity, 0))
                return [family]

        self.registry.register(ConnectionCollector())

    def follow_caches(self, caches: Sequence[ImageCache[Any]]) -> None:
        """Report the counters of the caches."""

        class FromCaches(Collector):
            def collect(self) -> list[CounterMetricFamily]:
                return [
                    CounterMetricFamily(f"blip2_{name}", words, value=sum(getattr(cache, count) for cache in caches))
                    for name, words, count in (
                        ("image_cache_hits", "Requests about a cached image", "hits"),
                        ("image_cache_misses", "Requests about a new image", "misses"),
                        ("images_encoded", "Images encoded", "num_encoded"),
                    )
                ]

        self.registry.register(FromCaches())

    def families(self) -> list[Metric]:
        families = list(self.registry.collect())
        if self._replica is not None:
            for family in families:
                family.samples = [
                    each._replace(labels={**each.labels, "replica": self._replica}) for each in family.samples
                ]
        return families

    def text(self) -> bytes:
        return text_of(self.families())


def text_of(families: Iterable[Metric]) -> bytes:
    """Prometheus' format, in which each name occurs once, with the samples of all servers."""
    found: dict[str, Metric] = {}
    for family in families:
        if family.name in found:
            found[family.name].samples += family.samples
        else:
            found[family.name] = family

    class Found(Collector):
        def collect(self) -> Iterable[Metric]:
            return found.values()

    return generate_latest(Found())
