"""Predicted times of a plan: plain arithmetic over assumed or measured rates.

TTFT = 2 flop x parameters x tokens / matmul rate + causal attention / its rate
TPOT = weights read + layers' own overhead + selections + rows and labels read, beside
       or after the rows that come over the link, whichever is longer
The default rates are one H100 80GB's with PCIe 5 x16. A prediction is for choosing
settings, not a result.
"""

import math
from dataclasses import dataclass

from .planner import Plan
from .weights import Weights


@dataclass(frozen=True)
class Rates:
    """Bytes, flop or seconds. origin says where the numbers come from."""

    origin: str = "one H100 80GB, PCIe 5 x16, measured there, not here"
    weight_bytes_s: float = 15.0e9 / 6.03e-3  # the GEMVs of an 8B model, 15 GB in 6.03 ms
    # What a layer does besides: norms, RoPE, activations, caches, gaps. From whole steps at 32,768 and
    # 131,072 tokens (bench/results/prefill_llama8b.json) less everything that is counted apart.
    plain_layer_s: float = 85e-6  # dense decode with transformers' own ops
    layer_s: float = 60e-6  # ours, norms and RoPE fused
    # Label scores and top-k of one layer: 50 us at 262,144 tokens; how much grows with tokens is a guess.
    select_base_s: float = 15e-6
    select_token_s: float = 35e-6 / 262144
    # Sticky selection of 16,384 rows a head: its bit maps 25 us, slots for them 27, remembering them 5.
    sticky_s: float = 57e-6
    hbm_bytes_s: float = 2.7e12  # dense flash decode: 1.07 GB a layer in 0.40 ms
    link_bytes_s: float = 50e9  # pinned copies
    # Row gathers out of 34 GB, as parts of what copies reach, by the part of all rows that is taken:
    # 33 GB/s at 1/128, 44 at 1/16.
    sparse_gather: float = 33 / 50
    dense_gather: float = 44 / 50
    # Of an 8B prefill of 262,144 tokens (the same file, its profile of 4 layers): 4.2e15 flop of matmuls
    # in 5.0 s and 3.1 s of all other kernels but attention; 1.8e16 flop of attention in 30.2 s.
    matmul_flop_s: float = 4.2e15 / 8.1
    attention_flop_s: float = 1.8e16 / 30.2

    def select_s(self, tokens: int) -> float:
        return self.select_base_s + tokens * self.select_token_s

    def gather_bytes_s(self, share: float) -> float:
        """Rate at which a selection of `share` of all rows comes; between the measured two by logarithm."""
        place = (math.log2(min(max(share, 1 / 128), 1 / 16)) + 7) / 3  # 0 at 1/128, 1 at 1/16
        return self.link_bytes_s * (self.sparse_gather + place * (self.dense_gather - self.sparse_gather))


@dataclass(frozen=True)
class Traffic:
    """What decides how many rows move. miss_rate: the part of a selection that is not resident yet, where
    sticky selection (new_rows) does not bound it; recall: the part of it that the prediction finds."""

    prefetch: str = "correct"
    new_rows: int | None = None
    miss_rate: float = 0.3
    recall: float = 0.7  # measured on tiny-256k at 1/16: 0.65 to 0.82


@dataclass(frozen=True)
class Times:
    """Seconds. *_tpot for: all KV in GPU memory read densely; the same read sparsely; offloaded.

    best: "dense", "sparse" or "offload"; why: in one sentence.
    """

    ttft: float
    dense_tpot: float
    sparse_tpot: float
    offload_tpot: float
    dense_fits: bool | None
    sparse_fits: bool | None
    miss_rate: float
    best: str
    why: str


def predict(plan: Plan, weights: Weights, rates: Rates, traffic: Traffic) -> Times:
    """Times of a plan on a GPU."""
    layout, tokens = plan.layout, plan.tokens
    kv_bytes = layout.layers * layout.heads * tokens * layout.row_bytes
    label_bytes = layout.layers * layout.label_bytes * tokens / layout.capacity
    selected_bytes = layout.layers * layout.heads * plan.budget * layout.row_bytes
    all_layers = layout.layers + len(layout.windows)
    read_weights = weights.active_bytes_in(layout.dtype) / rates.weight_bytes_s
    dense = read_weights + all_layers * rates.plain_layer_s + kv_bytes / rates.hbm_bytes_s
    selections = layout.layers * rates.select_s(tokens)
    sparse = read_weights + all_layers * rates.layer_s + selections
    sparse += (label_bytes + selected_bytes) / rates.hbm_bytes_s
    miss_rate = traffic.miss_rate
    if traffic.new_rows is not None:
        miss_rate = min(traffic.new_rows, plan.budget) / plan.budget
    missed_s = miss_rate * selected_bytes / rates.gather_bytes_s(plan.budget / tokens)
    sticky = layout.layers * rates.sticky_s if traffic.new_rows is not None else 0.0
    offload = offload_s(sparse, missed_s, selections, sticky, layout.layers, traffic)
    fits = gpu_fits(plan, kv_bytes)
    best, why = best_of({"dense": dense, "sparse": sparse, "offload": offload}, fits)
    first = ttft(plan, weights, rates)
    fitting = (fits["dense"], fits["sparse"])
    return Times(first, dense, sparse, offload, *fitting, miss_rate, best, why)


def offload_s(
    sparse: float, missed_s: float, selections: float, sticky: float, layers: int, traffic: Traffic
) -> float:
    """Seconds of an offloaded step. sparse: without transfers; missed_s: of the missed rows over the link;
    selections: of one selection in every layer; sticky: what a sticky one takes more.

    Layer i+1's rows travel while layer i computes; layer 0 has nobody to hide behind.
    """
    if traffic.prefetch == "off":
        return sparse + sticky + missed_s
    layers = max(layers, 1)
    if traffic.prefetch == "predict":
        return max(sparse, missed_s + selections + sticky) + missed_s / layers
    late = (1 - traffic.recall) * missed_s  # as much again was fetched in vain
    link = missed_s + late + 2 * selections
    return max(sparse + late, link) + 2 * sticky + missed_s / layers


def gpu_fits(plan: Plan, kv_bytes: int) -> dict[str, bool | None]:
    """Whether all KV fits in GPU memory: read densely it needs neither labels nor slots."""
    n, free = plan.needs, plan.free.gpu
    if free is None:
        return {"dense": None, "sparse": None}
    return {
        "dense": n.weights + kv_bytes + n.prefill + n.reserve <= free,
        "sparse": n.device - n.rows + kv_bytes <= free,
    }


def best_of(times: dict[str, float], fits: dict[str, bool | None]) -> tuple[str, str]:
    """The fastest of what fits, and the reason; what is not known to fit does not count."""
    usable = [name for name in times if name == "offload" or fits[name]]
    best = min(usable, key=lambda name: times[name])
    shown = {name: f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items()}
    unknown = any(fit is None for fit in fits.values())
    others = ["is not known to fit, no GPU here" if unknown else "does not fit"] * 2
    missing = [f"{name} {words}" for name, words in zip(("dense", "sparse"), others, strict=True)
               if name not in usable]  # fmt: skip
    beaten = [shown[name] for name in usable if name != best]
    reasons = [f"predicted at {shown[best].split(' ', 1)[1]}"]
    reasons += [f"against {' and '.join(beaten)}"] if beaten else []
    reasons += missing
    return best, ", ".join(reasons)


def ttft(plan: Plan, weights: Weights, rates: Rates) -> float:
    """Seconds of prefill; rows leave over the link while the GPU computes."""
    layout = plan.layout
    tokens = plan.batch * plan.tokens
    matmuls = 2 * weights.active * tokens
    # q k^T and p v are 2 flop each for S^2 / 2 pairs, query heads and head_dim.
    attention = layout.layers * 2 * tokens * plan.tokens * layout.query_heads * layout.head_dim
    compute = matmuls / rates.matmul_flop_s + attention / rates.attention_flop_s
    return max(compute, plan.needs.pinned / rates.link_bytes_s)
