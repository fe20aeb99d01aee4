"""What a server counts, for Prometheus. No prompt text is kept or shown anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from demur.guard import GuardScore

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("demur_requests", "Requests answered.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "demur_request_seconds", "Time to answer a request.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.verdicts = Counter("demur_prompts", "Prompts scored.", ["verdict", "flagged"], registry=registry)
        self.waiting = Gauge("demur_waiting_prompts", "Prompts in the queue.", registry=registry)
        self._batch = Histogram(
            "demur_batch_prompts", "Prompts in one forward pass.", buckets=_PROMPTS, registry=registry
        )
        self._parts = {
            part: Histogram(f"demur_{part}_seconds", meaning, buckets=_SECONDS, registry=registry)
            for part, meaning in (("model", "Forward pass of a batch."), ("probe", "Probes of a batch."))
        }

    def batch(self, prompts: int, model: float, probe: float) -> None:
        """One batch was scored: its size, and the seconds that the model and the probes took."""
        self._batch.observe(prompts)
        self._parts["model"].observe(model)
        self._parts["probe"].observe(probe)

    def scored(self, scores: Iterable[GuardScore]) -> None:
        """Prompts were scored."""
        for score in scores:
            self.verdicts.labels(score.verdict, str(score.flagged).lower()).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
