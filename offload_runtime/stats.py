"""What one generate call did and cost."""

from collections.abc import Sequence
from typing import Any

from .cache.layer_cache import PREDICTED, TRUE, LayerCache
from .cache.layout import KVLayout
from .cache.window_cache import WindowCache
from .generation import TokenLoop
from .kernels.residency import FROM_PREDICTION, HITS, SELECTED, WANTED

GB = 1e9
# cuBLAS keeps 32 MiB for every stream that multiplies matrices (measured, H100): prefill's
# stream, the one a CUDA graph is captured on and the prefetcher's.
CUBLAS_BYTES = 3 * (32 << 20)


def layer_stats(
    cache: LayerCache | WindowCache, attends_predicted: bool, place: int | None = None
) -> dict[str, Any]:
    """Row counts of one layer since its caches were cleared; of one sequence if `place` names it.

    budgets: K of each sequence and KV head; selected: rows attended to besides sinks
    and recent ones; hits: those that were on the GPU when attention wanted them;
    misses: those fetched then and there; prefetched: rows fetched on a prediction;
    recall: the part of the true selection, of a sticky one of what may enter, that this
    step's prediction had selected too (None without one).
    A sliding layer selects and moves nothing.
    """
    if isinstance(cache, WindowCache):
        moved: dict[str, Any] = dict.fromkeys(("selected", "hits", "misses", "prefetched", "bytes"), 0)
        return {**moved, "recall": None, "window": cache.window}
    counters = (cache.counters.sum(0) if place is None else cache.counters[place]).tolist()
    phase = counters[PREDICTED] if attends_predicted else counters[TRUE]
    prefetched = counters[PREDICTED][SELECTED] - counters[PREDICTED][HITS]
    missed = counters[TRUE][SELECTED] - counters[TRUE][HITS]
    has_prediction = counters[PREDICTED][WANTED] > 0 and not attends_predicted
    return {
        "budgets": (cache.budgets if place is None else cache.budgets[place, None]).tolist(),
        "selected": phase[SELECTED],
        "hits": phase[HITS],
        "misses": missed,
        "prefetched": prefetched,
        "bytes": (missed + prefetched) * cache.layout.row_bytes,
        "recall": phase[FROM_PREDICTION] / phase[WANTED] if has_prediction and phase[WANTED] else None,
    }


def collect(
    caches: Sequence[LayerCache | WindowCache],
    predicted: frozenset[int],
    attend_predicted: bool,
    place: int | None = None,
) -> dict[str, Any]:
    """The layers' counts and their sums: hit_rate, prefetch_recall, gather_gb; of one sequence or of all.

    budget_tokens: mean K over offloaded layers, sequences and KV heads, which adaptive budgets lower.
    """
    layers = [
        layer_stats(cache, attend_predicted and index in predicted, place)
        for index, cache in enumerate(caches)
    ]
    selected = sum(layer["selected"] for layer in layers)
    recalls = [layer["recall"] for layer in layers if layer["recall"] is not None]
    budgets = [k for layer in layers for heads in layer.get("budgets", ()) for k in heads]
    return {
        "budget_tokens": sum(budgets) / len(budgets) if budgets else None,
        "hit_rate": sum(layer["hits"] for layer in layers) / selected if selected else None,
        "prefetch_recall": sum(recalls) / len(recalls) if recalls else None,
        "gather_gb": sum(layer["bytes"] for layer in layers) / GB,
        "layers": layers,
    }


def memory(
    layout: KVLayout,
    sticky: bool,
    rows_on_gpu: bool,
    weight_bytes: int,
    prefill_peak: int | None,
    decode_peak: int | None,
) -> dict[str, float | None]:
    """Planned and measured memory in GB; the measured peaks are None on CPU.

    gpu_plan_gb is what decode should need: weights, caches and the matrix
    library's workspaces, everything but one token's activations.
    """

    def in_gb(count: int | None) -> float | None:
        return None if count is None else count / GB

    rows = layout.layers * layout.host_bytes
    caches = layout.gpu_bytes + (layout.sticky_bytes if sticky else 0) + (rows if rows_on_gpu else 0)
    return {
        "pinned_gb": 0.0 if rows_on_gpu else rows / GB,
        "weights_gb": weight_bytes / GB,
        "gpu_cache_gb": caches / GB,
        "gpu_plan_gb": (weight_bytes + caches + CUBLAS_BYTES) / GB,
        "gpu_prefill_peak_gb": in_gb(prefill_peak),
        "gpu_decode_peak_gb": in_gb(decode_peak),
    }


def call_figures(
    loop: TokenLoop, weight_bytes: int, calibration_s: float, fitted: list[str]
) -> dict[str, Any]:
    """Everything about one generate call that has run. fitted: what was shrunk for its caches."""
    session = loop.session
    assert session is not None
    prefetcher, on_gpu = session.prefetcher, session.config.placement == "gpu"
    audit = {} if session.audit is None else {"audit": session.audit.figures()}
    peaks = loop.prefill_peak_bytes, loop.decode_peak_bytes
    return {
        **loop.times,
        "batch": session.layout.batch,
        "placement": session.config.placement,
        "fitted": fitted,
        "prompt_tokens": loop.prompt_tokens,
        "new_tokens": loop.new_tokens,
        "cached_tokens": sum(len(ids) for ids in session.cached_ids),
        "reused_tokens": session.kept_tokens,
        "prefill": {**session.prefill_figures(), "calibration_s": calibration_s},
        **collect(session.caches, prefetcher.predicted_layers, prefetcher.attend_predicted),
        **memory(session.layout, session.new_rows is not None, on_gpu, weight_bytes, *peaks),
        "cuda_graph": session.decoder.graph is not None,
        **audit,
    }
