"""What /metrics tells, in Prometheus's words. Counts what it is told of."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # when each counter began, which nobody asks

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Of one server. Threads may share it."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("torchchat_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.prompt_tokens = Counter("torchchat_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "torchchat_prompt_tokens_cached", "Of these, those that were in the cache.", registry=registry
        )
        self.tokens = Counter("torchchat_generated_tokens", "Tokens generated.", registry=registry)
        self.failures = Counter("torchchat_engine_failures", "Steps of the engine that failed.", registry=registry)
        self.first = Histogram(
            "torchchat_time_to_first_token_seconds",
            "From a sequence's arrival to its first token.",
            buckets=FIRST_S,
            registry=registry,
        )
        self.between = Histogram(
            "torchchat_time_per_output_token_seconds",
            "From one token of a sequence to its next.",
            buckets=BETWEEN_S,
            registry=registry,
        )

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A figure that is looked at when it is asked for."""
        gauge = Gauge(f"torchchat_{name}", help, registry=self._registry)
        gauge.set_function(value)

    def page(self) -> bytes:
        return generate_latest(self._registry)
