"""A session whose cache contents, and if wanted its selections, are set by the benchmark, not by a prompt."""

from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.host_store import HandedOut, HostStore
from offload_runtime.bench.timing import step_ms
from offload_runtime.cache.layer_cache import PREDICTED, TRUE, LayerCache
from offload_runtime.cache.window_cache import WindowCache
from offload_runtime.calibration import Calibration
from offload_runtime.config import DEFAULT_LABEL_CHANNELS, RuntimeConfig
from offload_runtime.input_guess import Guesses, guess_rank
from offload_runtime.kernels.residency import FROM_PREDICTION, HITS, SELECTED, WANTED
from offload_runtime.session import Session

FILL_TOKENS = 8192  # random keys labelled at a time
TOKEN_IDS = 256  # token ids are drawn below this: every shape's vocabulary has them
BISECTIONS = 12  # halvings of [0, 1]: a cosine to 0.0003
PAIRS = 8  # of queries that are tried: single pairs share 0.1 more or less than the mean


class DrivenSession(Session):
    """Random rows and labels of random keys; settings and steps as in a real session.

    Undriven, the model's own queries select: with random weights they select at
    random. After drive(), queries are drawn so that consecutive selections of
    a layer overlap by a given share, and predicted ones find a given share of the true ones.
    """

    def __init__(
        self, adapter: ModelAdapter, config: RuntimeConfig, batch: int, store: HostStore | None = None
    ) -> None:
        shape = (batch, adapter.kv_heads, config.ctx, 2 * adapter.head_dim)
        self.handed_out: Any = None if store is None else HandedOut(store, shape)
        super().__init__(adapter, config, unit_calibration(adapter), batch, config.ctx)
        layout, device = self.layout, adapter.device
        self.driven = False
        self.step_cosine = self.guess_cosine = 1.0
        self.queries = torch.randn(
            (layout.layers, batch, layout.query_heads, layout.head_dim), device=device, dtype=layout.dtype
        )
        self.guess_noise = torch.randn_like(self.queries)
        self.guesses = self.queries.clone()
        self._fill()

    def _make_cache(self, window: int) -> LayerCache | WindowCache:
        assert not window, "no shape of the benchmark has sliding layers"
        if self.handed_out is None:
            return super()._make_cache(window)
        device = self.adapter.device
        return LayerCache(self.layout, self.state, device, self.new_rows, self.handed_out)

    def _fill(self) -> None:
        """Labels of random keys for every token, and rows where no store has them."""
        layout, device = self.layout, self.adapter.device
        for cache in self.offloaded.values():
            for start in range(0, layout.capacity, FILL_TOKENS):
                count = min(FILL_TOKENS, layout.capacity - start)
                keys = torch.randn(
                    (layout.batch, layout.kv_heads, count, layout.head_dim), device=device, dtype=layout.dtype
                )
                starts = torch.full((layout.batch,), start, dtype=torch.int32, device=device)
                cache.labels.write(keys, cache.maps, starts)
                if self.handed_out is None:
                    rows = torch.cat([keys, keys], -1)  # [B, Hkv, T, 2 D]
                    cache.host.link_rows[:, :, start : start + count].copy_(rows)

    def restart(self, steps: int) -> None:
        """Nothing resident and nothing counted; lengths such that `steps` more tokens fill the context."""
        self.clear()
        for cache in self.offloaded.values():
            fixed = self.layout.fixed_slots
            cache.resident.slots[:, :, :fixed] = cache.host.link_rows[:, :, :fixed].to(self.adapter.device)
        self.state.lengths.fill_(self.layout.capacity - steps)
        for cache in self.offloaded.values():
            cache.budgets.fill_(self.config.budget_tokens(self.layout.capacity))

    def forget_resident(self) -> None:
        """The next step has to fetch every row it selects."""
        for cache in self.offloaded.values():
            cache.resident.clear()

    def drive(self, overlap: float | None, recall: float = 1.0) -> None:
        """Select by drawn queries, with these shares kept from step to step and found by prediction.

        None: by the model's own again. The next step is captured anew. Call after restart().
        """
        for cache in self.offloaded.values():
            cache.__dict__.pop("label_query", None)
        self.driven = overlap is not None
        self.decoder.forget_graph()
        if overlap is None:
            return
        self.step_cosine, self.guess_cosine = self._cosine_for(overlap), self._cosine_for(recall)
        for index, cache in self.offloaded.items():
            self._drive_cache(index, cache)

    def _drive_cache(self, index: int, cache: LayerCache) -> None:
        plain = cache.label_query

        def drawn(_: torch.Tensor, scale: float, phase: int) -> tuple[torch.Tensor, torch.Tensor]:
            return plain(self.guesses[index] if phase == PREDICTED else self.queries[index], scale, phase)

        cache.label_query = drawn  # type: ignore[method-assign, assignment]

    def _cosine_for(self, overlap: float) -> float:
        """The cosine of two random queries whose exact selections share `overlap` of their tokens."""
        pairs = [(torch.randn_like(self.queries[0]), torch.randn_like(self.queries[0])) for _ in range(PAIRS)]
        firsts = [self._exact_selection(first) for first, _ in pairs]
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            cosine = (low + high) / 2
            others = [self._exact_selection(moved(first, noise, cosine)) for first, noise in pairs]
            shared = sum(float((a & b).sum()) for a, b in zip(firsts, others, strict=True))
            shared /= sum(float(a.sum()) for a in firsts)
            low, high = (cosine, high) if shared < overlap else (low, cosine)
        return (low + high) / 2

    def _exact_selection(self, query: torch.Tensor) -> torch.Tensor:
        """Which tokens of layer 0 a query [B, Hq, D] selects: [B, Hkv, N] bool."""
        cache, selection = self.offloaded[0], self.prefetcher.selection
        history, cache.history = cache.history, None  # sticky selection aside
        asked = cache.label_query(query, self.layout.head_dim**-0.5, TRUE)
        cache.select(asked, selection, self.prefetcher.work, TRUE, True)
        cache.history = history
        chosen = torch.zeros_like(cache.resident.slot_of_token, dtype=torch.bool)
        count = int(selection.counts.min())  # the same for all: lengths and budgets are
        return chosen.scatter_(-1, selection.tokens[..., :count].long(), True)

    def _move_queries(self) -> None:
        if not self.driven:
            return
        self.queries.copy_(moved(self.queries, torch.randn_like(self.queries), self.step_cosine))
        # The error of a prediction moves on as slowly as the query does.
        self.guess_noise.copy_(moved(self.guess_noise, torch.randn_like(self.queries), self.step_cosine))
        self.guesses.copy_(moved(self.queries, self.guess_noise, self.guess_cosine))

    def _next_tokens(self) -> torch.Tensor:
        return torch.randint(0, TOKEN_IDS, (self.layout.batch,), device=self.adapter.device)

    def advance(self) -> None:
        """One step on random tokens, queries moved on by one step's worth."""
        self._move_queries()
        self.step(self._next_tokens())

    def timed_step(self, keep_resident: bool = True) -> float:
        """Milliseconds of one step; with keep_resident False it has to fetch all it selects."""
        self._move_queries()
        if not keep_resident:
            self.forget_resident()
        tokens = self._next_tokens()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return step_ms(lambda: self.step(tokens), self.adapter.device)

    def counted(self) -> dict[str, int]:
        """Rows since restart(): selected, fetched; of those a prediction should have had, those it had."""
        counters = torch.stack([cache.counters.sum(0) for cache in self.offloaded.values()])  # [L, 2, 4]
        fetched = int((counters[:, :, SELECTED] - counters[:, :, HITS]).sum())
        late = counters[:, TRUE]
        predicted_only = late[:, SELECTED] == 0  # mode "predict": these layers attend to the prediction
        attended = torch.where(predicted_only, counters[:, PREDICTED, SELECTED], late[:, SELECTED])
        corrected = (counters[:, PREDICTED, WANTED] > 0) & ~predicted_only
        return {
            "selected": int(attended.sum()),
            "fetched": fetched,
            "checked": int((late[:, WANTED] * corrected).sum()),
            "found": int((late[:, FROM_PREDICTION] * corrected).sum()),
        }

    def close(self) -> None:
        """Drop the graph and the caches; the store stays whose it is."""
        self.decoder.forget_graph()
        self.caches.clear()
        self.offloaded.clear()


def moved(start: torch.Tensor, noise: torch.Tensor, cosine: float) -> torch.Tensor:
    """Normal numbers that correlate with `start` by `cosine`."""
    return start * cosine + noise * (1 - cosine * cosine) ** 0.5


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
        guesses=faint_guesses(adapter),
    )


def faint_guesses(adapter: ModelAdapter) -> Guesses:
    """Guesses that cost what a calibration's do and change nothing: random layers have no step to guess.

    In host memory, as a file's are, so that only the session's own count on the GPU.
    """
    layers, width = len(adapter.layers), adapter.shape.hidden
    rank = guess_rank(width)
    down = torch.ones(layers, rank, width, dtype=adapter.dtype)
    up = torch.full((layers, width, rank), 1e-30, dtype=adapter.dtype)
    up[0] = 0
    return Guesses(torch.zeros(layers, width), down, up)
