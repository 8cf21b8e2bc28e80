"""A job's figures for Prometheus, at http://localhost:PORT/metrics while it runs."""

from typing import Any

from ..errors import UserError
from .progress import Watcher
from .worker import Outcome


class Metrics(Watcher):
    """Counts documents, tokens, bytes and seconds. Needs the extra `metrics`."""

    def __init__(self, port: int) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise UserError("--metrics-port needs a library: pip install 'ds-offload[metrics]'") from error
        registry = prometheus.CollectorRegistry()

        def counter(name: str, meaning: str, labels: tuple[str, ...] = ()) -> Any:
            return prometheus.Counter(f"ds_offload_{name}", meaning, labels, registry=registry)

        self.total = prometheus.Gauge("ds_offload_job_documents", "Documents to do", registry=registry)
        self.documents = counter("documents", "Documents with a line, by outcome", ("outcome",))
        self.tokens = counter("tokens", "Tokens, by kind", ("kind",))
        self.gathered = counter("gathered_bytes", "Rows fetched from host memory")
        self.seconds = prometheus.Histogram(
            "ds_offload_document_seconds",
            "Time a document took",
            registry=registry,
            buckets=[1, 3, 10, 30, 100, 300, 1000, 3000],
        )
        for result in ("ok", "error"):
            self.documents.labels(result)
        try:
            self.server, self.thread = prometheus.start_http_server(port, registry=registry)
        except (OSError, OverflowError) as error:
            raise UserError(f"--metrics-port {port} cannot be used: {error}") from error

    def start(self, documents: int, size: int) -> None:
        self.total.set(documents)

    def finish(self, outcome: Outcome, size: int) -> None:
        record = outcome.record
        self.documents.labels("error" if record["error"] else "ok").inc()
        self.tokens.labels("prompt").inc(record["prompt_tokens"])
        self.tokens.labels("new").inc(record["new_tokens"])
        self.gathered.inc(record["gather_gb"] * 1e9)
        self.seconds.observe(record["seconds"])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
