"""A session whose cache contents and queries are set by the benchmark, not by a prompt."""

from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.cache.layer_cache import PREDICTED
from offload_runtime.calibration import Calibration
from offload_runtime.config import DEFAULT_LABEL_CHANNELS, RuntimeConfig
from offload_runtime.kernels.residency import HITS, SELECTED
from offload_runtime.session import Session

PREDICTION_COSINE = 0.9  # of a predicted query with the true one, driven sessions only (paper: 0.85 to 0.99)
FILL_TOKENS = 8192  # random tokens made at a time


class DrivenSession(Session):
    """Random rows and labels; with `overlap`, queries that keep a share of themselves from step to step.

    overlap is the cosine of a layer's consecutive queries as selection sees
    them; `measured_overlap` says which part of a selection it let stay.
    """

    settle_steps = 6  # compile, capture, and let the resident set reach its steady state

    def __init__(
        self, adapter: ModelAdapter, config: RuntimeConfig, batch: int, overlap: float | None
    ) -> None:
        super().__init__(adapter, config, unit_calibration(adapter), batch, config.ctx)
        self.overlap = overlap
        layout, device = self.layout, adapter.device
        shape = (layout.layers, batch, layout.query_heads, layout.head_dim)
        self.queries = torch.randn(shape, device=device, dtype=layout.dtype)
        self.guesses = self.queries.clone()
        if overlap is not None:
            self._drive()

    def _drive(self) -> None:
        """Make selection use the benchmark's queries instead of the model's."""
        for index, cache in enumerate(self.caches):
            plain = cache.choose

            def choose(
                query: torch.Tensor, scale: float, selection: Any, work: Any, phase: int,
                plain: Any = plain, index: int = index,
            ) -> None:  # fmt: skip
                driven = self.guesses[index] if phase == PREDICTED else self.queries[index]
                plain(driven + 0 * query, scale, selection, work, phase)

            cache.choose = choose  # type: ignore[method-assign]

    def fill(self) -> None:
        """Random rows in host memory, labels of random keys, lengths just short of capacity."""
        layout, device = self.layout, self.adapter.device
        heads = (layout.batch, layout.kv_heads)
        rows = torch.randn(*heads, FILL_TOKENS, layout.row_elements, device=device, dtype=layout.dtype)
        for cache in self.caches:
            cache.resident.slots[:, :, : layout.fixed_slots] = rows[:, :, : layout.fixed_slots]
            for start in range(0, layout.capacity, FILL_TOKENS):
                count = min(FILL_TOKENS, layout.capacity - start)
                keys = torch.randn(*heads, count, layout.head_dim, device=device, dtype=layout.dtype)
                starts = torch.full((layout.batch,), start, dtype=torch.int32, device=device)
                cache.labels.write(keys, cache.maps, starts)
                for b in range(layout.batch):
                    for h in range(layout.kv_heads):
                        cache.host.rows[b, h, start : start + count].copy_(
                            rows[b, h, :count], non_blocking=True
                        )
        room = 512  # steps that a benchmark may take
        self.state.lengths.fill_(layout.capacity - room)
        for cache in self.offloaded.values():
            cache.budgets.fill_(self.config.budget_tokens(layout.capacity))
        torch.cuda.synchronize()

    def advance(self) -> None:
        """One step on random tokens, queries moved on by one step's worth."""
        self._move_queries()
        self.step(torch.randint(0, 1000, (self.layout.batch,), device=self.adapter.device))

    def _move_queries(self) -> None:
        if self.overlap is None:
            return
        c, p = self.overlap, PREDICTION_COSINE
        self.queries.mul_(c).add_(torch.randn_like(self.queries), alpha=(1 - c * c) ** 0.5)
        noise = torch.randn_like(self.queries)
        self.guesses.copy_(self.queries * p).add_(noise, alpha=(1 - p * p) ** 0.5)

    def timed_step(self) -> float:
        """Milliseconds of one step on the GPU."""
        self._move_queries()
        tokens = torch.randint(0, 1000, (self.layout.batch,), device=self.adapter.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        self.step(tokens)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def moved_bytes(self) -> int:
        counters = torch.stack([cache.counters for cache in self.caches])  # [L, 2, 3]
        missed = counters[:, :, SELECTED] - counters[:, :, HITS]
        return int(missed.sum()) * self.layout.row_bytes

    def measured_overlap(self) -> float | None:
        """Part of the selected rows that were resident already, over all steps so far."""
        counters = torch.stack([cache.counters for cache in self.caches])  # [L, 2, 3]
        phase = counters[:, 0] if self.prefetcher.attend_predicted else counters[:, 1]
        selected = int(phase[:, SELECTED].sum())
        return round(int(phase[:, HITS].sum()) / selected, 4) if selected else None

    def close(self) -> None:
        self.decoder.graph = None
        self.caches.clear()
        torch.cuda.empty_cache()


def unit_calibration(adapter: ModelAdapter) -> Calibration:
    """The first channels of every key as its label: random keys have no better ones."""
    layers, dim = len(adapter.layers), adapter.head_dim
    unit = torch.eye(dim, device=adapter.device)[:DEFAULT_LABEL_CHANNELS]  # [R, D]
    return Calibration(
        query_map=unit.expand(layers, adapter.query_heads, -1, -1),
        key_map=unit.expand(layers, adapter.kv_heads, -1, -1),
        key_mean=torch.zeros(layers, adapter.kv_heads, dim, device=adapter.device),
        unpredicted_layers=(0,),
        provenance={},
    )
