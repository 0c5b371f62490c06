"""What Prometheus may read of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from firstlab.engine.engine import EngineOutput

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters and times of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "firstlab_requests",
            "Requests; 499: the client left early",
            ("endpoint", "status"),
            registry=own,
        )
        self.prompt_tokens = Counter("firstlab_prompt_tokens", "Tokens of accepted prompts", registry=own)
        self.tokens = Counter("firstlab_generated_tokens", "Tokens of responses", registry=own)
        self.layers = Counter("firstlab_layers", "Layers of decoded tokens, run and skipped", ("state",), registry=own)
        self.steps = Counter("firstlab_decode_steps", "Decode steps of the batch", registry=own)
        self.union = Counter("firstlab_union_layers", "Layers that some row of a step ran, summed up", registry=own)
        self.running = Gauge("firstlab_requests_running", "Requests that decode", registry=own)
        self.waiting = Gauge("firstlab_requests_waiting", "Requests without a place", registry=own)
        self.first_token = Histogram("firstlab_ttft_seconds", "To the first token", buckets=_SECONDS, registry=own)
        tenths = [seconds / 10 for seconds in _SECONDS]
        self.per_token = Histogram("firstlab_tpot_seconds", "Per token after the first", buckets=tenths, registry=own)

    def turn(self, tokens: int, steps: int, layers_read: int, running: int, waiting: int) -> None:
        """Count one turn of the batch."""
        self.tokens.inc(tokens)
        self.steps.inc(steps)
        self.union.inc(layers_read)
        self.running.set(running)
        self.waiting.set(waiting)

    def end(self, output: EngineOutput, seconds: float) -> None:
        """Count a response that went on for these seconds after its first token."""
        if decoded := len(output.tokens[0]) - 1:
            self.per_token.observe(seconds / decoded)
            skipped = float(output.layer_skips.sum()) * decoded
            self.layers.labels("skipped").inc(skipped)
            self.layers.labels("run").inc(output.layer_skips.numel() * decoded - skipped)
