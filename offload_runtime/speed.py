"""Predicted times of a plan: plain arithmetic over assumed or measured rates.

TTFT = see speed_prefill.py
TPOT = weights read + layers' own overhead + selections + rows and labels read, beside
       or after the rows that come over the link, whichever is longer
The default rates are one H100 80GB's with PCIe 5 x16. A prediction is for choosing
settings, not a result.
"""

from dataclasses import dataclass, field

from .planner import Plan
from .speed_prefill import PrefillRates, prefill_times
from .weights import Weights


@dataclass(frozen=True)
class Rates:
    """Bytes, flop or seconds. origin says where the numbers come from."""

    origin: str = "one H100 80GB, PCIe 5 x16, measured there, not here"
    # Products of a decode step reach 2.3 to 3.1 TB/s (bench/results/products.json), whole steps less.
    weight_bytes_s: float = 2.75e12
    # What a layer does besides: norms, RoPE, activations, caches, gaps. From whole steps of two shapes at
    # 32,768 to 262,144 tokens (bench/results/bench_*.json, tests/test_speed.py) less what is counted apart.
    plain_layer_s: float = 40e-6  # dense decode
    layer_s: float = 30e-6  # ours
    # Label scores and top-k of one layer: 42 to 47 us at 262,144 tokens of 8 KV heads, 40 fit whole steps
    # best; how much grows with labels is a guess.
    select_base_s: float = 10e-6
    select_label_s: float = 30e-6 / (8 * 262144)
    # Of a layer whose rows are on the GPU: slots for its selection and the copies there, which nothing hides.
    # What two measured steps lack (bench/results/prefill_llama8b.json).
    in_memory_s: float = 60e-6
    # Sticky selection of 16,384 rows a head took 74 us where exact selection of 2,048 takes 44, its slots 36
    # where 15 (H100, 262,144 tokens, within a step; 35 fits its steps best). In two parts and with today's
    # kernels, not timed on an H100, 18 fits an H200's best. With 25 all steps of both are within 20%.
    sticky_s: float = 25e-6
    hbm_bytes_s: float = 2.97e12  # copies within GPU memory, as `ds-offload bench` measures them
    link_bytes_s: float = 50e9  # pinned copies
    gather: float = 47 / 50  # row gathers out of 34 GB of managed memory, as a part of what copies reach
    prefill: PrefillRates = field(default_factory=PrefillRates)

    def select_s(self, labels: int) -> float:
        """Of one layer; labels: tokens times KV heads of the batch."""
        return self.select_base_s + labels * self.select_label_s


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
    """Seconds. ttft is the sum of its three parts (speed_prefill.py). *_tpot for: all KV in GPU memory
    read densely; the same read sparsely; offloaded.

    best: "dense", "sparse" or "offload"; why: in one sentence.
    """

    ttft: float
    ttft_calibration: float
    ttft_compute: float
    ttft_memory: float
    dense_tpot: float
    sparse_tpot: float
    offload_tpot: float
    dense_fits: bool | None
    sparse_fits: bool | None
    miss_rate: float
    best: str
    why: str


def predict(plan: Plan, weights: Weights, rates: Rates, traffic: Traffic, calibrated: bool = False) -> Times:
    """Times of a plan on a GPU. calibrated: there is a calibration, so none is made from the prompt."""
    layout, tokens = plan.layout, plan.tokens
    kv_bytes = layout.layers * layout.heads * tokens * layout.row_bytes
    label_bytes = layout.layers * layout.label_bytes * tokens / layout.capacity
    selected_bytes = layout.layers * layout.heads * plan.budget * layout.row_bytes
    all_layers = layout.layers + len(layout.windows)
    read_weights = weights.read_bytes_in(layout.dtype) / rates.weight_bytes_s
    dense = read_weights + all_layers * rates.plain_layer_s + kv_bytes / rates.hbm_bytes_s
    selections = layout.layers * rates.select_s(layout.heads * tokens)
    sparse = read_weights + all_layers * rates.layer_s + selections
    sparse += (label_bytes + selected_bytes) / rates.hbm_bytes_s
    miss_rate = traffic.miss_rate
    if traffic.new_rows is not None:
        miss_rate = min(traffic.new_rows, plan.budget) / plan.budget
    missed_s = miss_rate * selected_bytes / (rates.link_bytes_s * rates.gather)
    sticky = layout.layers * rates.sticky_s if traffic.new_rows is not None else 0.0
    offload = offload_s(sparse, missed_s, selections, sticky, layout.layers, traffic)
    fits = gpu_fits(plan, kv_bytes)
    sparse += layout.layers * rates.in_memory_s
    best, why = best_of({"dense": dense, "sparse": sparse, "offload": offload}, fits)
    parts = prefill_times(plan, weights, rates.prefill, rates.link_bytes_s, calibrated)
    fitting = (fits["dense"], fits["sparse"])
    return Times(sum(parts), *parts, dense, sparse, offload, *fitting, miss_rate, best, why)


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
