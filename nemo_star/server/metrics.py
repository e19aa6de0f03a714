"""What /metrics says, for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class EngineState:
    """Of the engine, after a step."""

    live: int
    """Answers under way."""
    encodings: int
    contexts: int
    """In memory, complete."""
    kv_bytes: int
    """Of contexts, on the fullest rank."""
    kv_budget_bytes: int
    kv_tokens_by_rank: list[int]
    """Of contexts in memory, by cp rank."""


class Metrics:
    """Counters, gauges and histograms of one service; any thread may count."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # of rank 0: memory, processor time, open files
        self.requests = self._counter("requests", "HTTP requests by route and status", "route", "status")
        self.encoded_tokens = self._counter("context_tokens_encoded", "Context tokens that were encoded")
        self.found_tokens = self._counter(
            "context_tokens_found", "Context tokens that were known and not encoded again"
        )
        self.blocks = self._counter("blocks_encoded", "Blocks of contexts, by the cp rank that encoded them", "cp_rank")
        self.query_tokens = self._counter("query_tokens", "Tokens of queries")
        self.generated_tokens = self._counter("generated_tokens", "Tokens of answers")
        self.waiting = self._gauge("requests_waiting", "Requests whose turn has not come")
        self.running = self._gauge("requests_running", "Requests whose context is being encoded, or answer under way")
        self.queue_seconds = self._histogram("queue_seconds", "Until a request's context has its turn")
        self.prefill_seconds = self._histogram("prefill_seconds", "Until it is encoded, where it has to be")
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "From request to first token")
        self.token_seconds = self._histogram("time_per_output_token_seconds", "Between two tokens of an answer")
        self._live = self._gauge("answers_live", "Answers that decode together")
        self._encodings = self._gauge("encodings", "Contexts being encoded")
        self._contexts = self._gauge("contexts", "Encoded contexts in memory")
        self._kv_bytes = self._gauge("kv_bytes", "K/V of contexts on the fullest rank")
        self._kv_budget = self._gauge("kv_budget_bytes", "What they may take there")
        self._kv_tokens = self._gauge("kv_tokens", "Context tokens in memory, by cp rank", "cp_rank")

    def engine(self, state: EngineState) -> None:
        """Take over what the engine says."""
        self._live.set(state.live)
        self._encodings.set(state.encodings)
        self._contexts.set(state.contexts)
        self._kv_bytes.set(state.kv_bytes)
        self._kv_budget.set(state.kv_budget_bytes)
        for rank, tokens in enumerate(state.kv_tokens_by_rank):
            self._kv_tokens.labels(rank).set(tokens)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"nemo_star_{name}", help, labels, registry=self._registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"nemo_star_{name}", help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"nemo_star_{name}", help, registry=self._registry, buckets=_SECONDS)
