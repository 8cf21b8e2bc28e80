"""Predicted against measured time of a token: dense in GPU memory, sparse in GPU memory, offloaded."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.baselines import dense_times
from offload_runtime.bench.driven import DrivenSession
from offload_runtime.bench.rows import Rows
from offload_runtime.cache.layer_cache import TRUE
from offload_runtime.cli_plan import rates_here
from offload_runtime.config import RuntimeConfig
from offload_runtime.kernels.residency import FROM_PREDICTION, WANTED
from offload_runtime.memory import FreeMemory
from offload_runtime.planner import make_plan
from offload_runtime.speed import Times, Traffic, predict
from offload_runtime.weights import count_weights

STEPS = 20
SETTLE_STEPS = 6  # compile, capture, and let the resident set reach its steady state
EMPTY = FreeMemory(host=1 << 60, gpu=1 << 60)


def off_by(measured_ms: float, predicted_s: float) -> dict[str, float]:
    return {
        "measured_ms": measured_ms,
        "predicted_ms": 1e3 * predicted_s,
        "off_by": 1e3 * predicted_s / measured_ms - 1,
    }


class TimesOfPlan:
    """Rows of one model and context. Random cache contents, no prefill; no locality between steps."""

    def __init__(self, model: PreTrainedModel, ctx: int, budget: str, rows: Rows) -> None:
        self.adapter, self.ctx, self.budget, self.rows = ModelAdapter(model), ctx, budget, rows
        self.weights, self.rates = count_weights(model.config), rates_here("auto")

    def predicted(self, config: RuntimeConfig, traffic: Traffic) -> Times:
        model_config, dtype = self.adapter.model.config, self.adapter.dtype
        plan = make_plan(config, model_config, EMPTY, "cuda", dtype=dtype, weights=self.weights)
        return predict(plan, self.weights, self.rates, traffic)

    def dense(self) -> dict[str, Any]:
        measured = statistics.median(dense_times(self.adapter, self.ctx, 1, STEPS))
        return off_by(measured, self.predicted(RuntimeConfig(ctx=self.ctx), Traffic()).dense_tpot)

    def sparse(self, placement: str, mode: str) -> dict[str, Any]:
        """placement "gpu": sparse in GPU memory; "host": offloaded."""
        config = RuntimeConfig(ctx=self.ctx, budget=self.budget, prefetch=mode, placement=placement)
        session = DrivenSession(self.adapter, config, 1)
        try:
            session.restart(SETTLE_STEPS + STEPS)
            for _ in range(SETTLE_STEPS):
                session.advance()
            before = session.counted()["fetched"]
            measured = statistics.median(session.timed_step() for _ in range(STEPS))
            moved = (session.counted()["fetched"] - before) * session.layout.row_bytes / STEPS
            counters = torch.stack([cache.counters for cache in session.offloaded.values()])[:, TRUE].sum(0)
            layout = session.layout
        finally:
            session.close()
        recall = float(counters[FROM_PREDICTION] / counters[WANTED]) if mode == "correct" else 1.0
        share = moved / (layout.layers * layout.heads * layout.budget * layout.row_bytes)
        times = self.predicted(config, Traffic(mode, None, share / (2 - recall), recall))
        predicted = times.sparse_tpot if placement == "gpu" else times.offload_tpot
        facts = {"budget": self.budget, "moved_mb": moved / 1e6, "moved_share": share, "recall": recall}
        return off_by(measured, predicted) | facts

    def add_all(self) -> None:
        about = 4 + 40e-6 * self.ctx  # seconds: filling, and pinning 131 KB a token of the 8B shape
        jobs: dict[str, Callable[[], dict[str, Any]]] = {
            "dense in GPU memory": self.dense,
            "sparse in GPU memory, off": lambda: self.sparse("gpu", "off"),
            "offload, predict": lambda: self.sparse("host", "predict"),
            "offload, correct": lambda: self.sparse("host", "correct"),
        }
        with torch.no_grad():
            for name, job in jobs.items():
                self.rows.add(f"a token at {self.ctx}: {name}", job, about)
