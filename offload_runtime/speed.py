"""Predicted times of a plan: plain arithmetic over assumed or measured rates.

TPOT  = weights read + layers' own overhead + rows and labels read + transfer that is not hidden
TTFT  = 2 flop x parameters x tokens / matmul rate + causal attention / its rate
The default rates are one H100 80GB's with PCIe 5 x16, measured with Hugging
Face's layers in a CUDA graph. A prediction is for choosing settings, not a result.
"""

from dataclasses import dataclass

from .planner import Plan
from .weights import Weights


@dataclass(frozen=True)
class Rates:
    """Bytes and flop a second. origin says where the numbers come from."""

    origin: str = "one H100 80GB, PCIe 5 x16, measured"
    weight_bytes_s: float = 15.0e9 / 6.03e-3  # the GEMVs of an 8B model, 15 GB in 6.03 ms
    layer_s: float = (7.95e-3 - 6.03e-3) / 32  # norms, RoPE, activations: the same 32 layers in a CUDA graph
    hbm_bytes_s: float = 2.7e12  # dense flash decode: 1.07 GB a layer in 0.40 ms
    link_bytes_s: float = 50e9  # pinned copies and ascending 512-byte row gathers
    matmul_flop_s: float = 700e12  # 8B prefill of 262,144 tokens: 4.2e15 flop in 6 s
    attention_flop_s: float = 363e12  # SDPA flash


@dataclass(frozen=True)
class Times:
    """Seconds. *_tpot for: all KV in GPU memory read densely; the same read sparsely; offloaded."""

    ttft: float
    dense_tpot: float
    sparse_tpot: float
    offload_tpot: float
    dense_fits: bool | None
    miss_rate: float


def predict(plan: Plan, weights: Weights, rates: Rates, new_rows: int | None, miss_rate: float) -> Times:
    """Times of a plan on a GPU.

    miss_rate: the part of a selection that is not resident yet, when sticky
    selection (new_rows) does not bound it.
    """
    layout, tokens = plan.layout, plan.tokens
    kv_bytes = layout.layers * layout.heads * tokens * layout.row_bytes
    label_bytes = layout.layers * layout.label_bytes * tokens / layout.capacity
    selected_bytes = layout.layers * layout.heads * plan.budget * layout.row_bytes
    all_layers = layout.layers + len(layout.windows)
    fixed = weights.active_bytes_in(layout.dtype) / rates.weight_bytes_s + all_layers * rates.layer_s
    sparse = fixed + (label_bytes + selected_bytes) / rates.hbm_bytes_s
    if new_rows is not None:
        miss_rate = min(new_rows, plan.budget) / plan.budget
    transfer = miss_rate * selected_bytes / rates.link_bytes_s
    return Times(
        ttft=ttft(plan, weights, rates),
        dense_tpot=fixed + kv_bytes / rates.hbm_bytes_s,
        sparse_tpot=sparse,
        # Layer i+1's rows travel while layer i computes; layer 0 has nobody to hide behind.
        offload_tpot=max(sparse, transfer) + transfer / max(layout.layers, 1),
        dense_fits=None if plan.free.gpu is None else plan.needs.weights + kv_bytes <= plan.free.gpu,
        miss_rate=miss_rate,
    )


def ttft(plan: Plan, weights: Weights, rates: Rates) -> float:
    """Seconds of prefill; rows leave over the link while the GPU computes."""
    layout = plan.layout
    tokens = plan.batch * plan.tokens
    matmuls = 2 * weights.active * tokens
    # q k^T and p v are 2 flop each for S^2 / 2 pairs, query heads and head_dim.
    attention = layout.layers * 2 * tokens * plan.tokens * layout.query_heads * layout.head_dim
    compute = matmuls / rates.matmul_flop_s + attention / rates.attention_flop_s
    return max(compute, plan.needs.pinned / rates.link_bytes_s)
