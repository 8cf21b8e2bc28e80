"""Predicted time to the first token: calibration, computing, and memory for the rows.

Every term is bytes, flop or launches at a rate, so that it holds for other shapes. The rates
are one H100 80GB's (bench/results/prefill_llama8b.json: the profile of four layers at
262,016 tokens), checked against whole prefills of 8 and 32 layers.
"""

import math
from dataclasses import dataclass

from .calibration_collect import PROMPT_TOKENS
from .planner import Plan
from .weights import Weights

GIB = 2**30


@dataclass(frozen=True)
class PrefillRates:
    """Flop, bytes or launches by the second; seconds."""

    matmul_flop_s: float = 4.57e14 / 0.623  # 2 flop x 218 million parameters x 262,016 tokens x 4 layers
    attention_flop_s: float = 2.25e15 / 3.774  # cuDNN; 2 flop x 2 x S^2 / 2 x 32 heads x 128 x 4 layers
    # Norms, residuals, activation, transformers' RoPE, staging: kernels that do not reach the memory's rate.
    elementwise_bytes_s: float = 3.86e11 / 0.247
    merge_bytes_s: float = 1.29e11 / 0.051  # of attention over pieces of the keys
    # 25,533 launches for 4 layers x 64 chunks. 5 us each is an assumption: it counts for small models only.
    launches: int = 100
    launch_s: float = 5e-6
    # To populate and register (bench/results/pinning.json: 0.11 + 0.024 in regions of 128 MiB).
    pin_s_gib: float = 0.13
    # Of it the registering. Launches wait meanwhile: 0.1 explains six prefills of 4 to 32 GiB within 9 %
    # (fitted); vLLM's pull request 51081 measured as much for registering alone.
    register_s_gib: float = 0.1
    # Self-calibration beside its forward pass: 0.30 s in all for 32 layers when no row memory is made
    # meanwhile (bench/results/first_token.json). LAPACK takes 2.5 ms for a matrix on one core (an estimate).
    calibration_layer_s: float = 8e-3
    eigen_s: float = 2.5e-3
    cores: int = 16


def prefill_times(
    plan: Plan, weights: Weights, rates: PrefillRates, link_bytes_s: float, calibrated: bool
) -> tuple[float, float, float]:
    """Seconds of self-calibration, of computing, and of what waits for row memory and for the link."""
    calibration = 0.0 if calibrated else calibration_s(plan, weights, rates)
    compute = plan.batch * compute_s(plan, weights, rates)
    return calibration, compute, memory_s(plan, calibration, compute, rates, link_bytes_s)


def calibration_s(plan: Plan, weights: Weights, rates: PrefillRates) -> float:
    """A pass over a batch of two of the prompt's first tokens, then the label maps."""
    layers, tokens = plan.shape.layers, 2 * min(PROMPT_TOKENS, plan.tokens)
    matrices = layers * plan.shape.kv_heads * rates.eigen_s / min(rates.cores, layers)
    forward = 2 * weights.multiplied * tokens / rates.matmul_flop_s
    return forward + layers * rates.calibration_layer_s + matrices


def compute_s(plan: Plan, weights: Weights, rates: PrefillRates) -> float:
    """One sequence's kernels, or their launches where those take longer."""
    shape, tokens = plan.shape, plan.tokens
    chunks = max(1.0, tokens / plan.chunk_tokens)
    seen = [min(window, tokens / 2) if window else tokens / 2 for window in shape.windows]
    # q k^T and p v are 2 flop each for every pair of a query and a key that it sees, head and number.
    attention = 4 * tokens * sum(seen) * shape.query_heads * shape.head_dim / rates.attention_flop_s
    matmul = 2 * weights.multiplied * tokens / rates.matmul_flop_s
    elementwise = shape.layers * tokens * elementwise_bytes(plan) / rates.elementwise_bytes_s
    # The keys before a chunk are pieces of 1, 2, 4, ... chunks: half of the powers of two, in the mean.
    merges = shape.layers * tokens * math.log2(chunks) / 2 * merge_bytes(plan) / rates.merge_bytes_s
    launching = shape.layers * math.ceil(chunks) * rates.launches * rates.launch_s
    return max(matmul + attention + elementwise + merges, launching)


def elementwise_bytes(plan: Plan) -> int:
    """Read and written by a token in one layer, matrices and attention left out."""
    shape = plan.shape
    hidden, wide = shape.hidden, shape.experts_used * shape.intermediate
    queries, keys = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rotary = 10 * (queries + keys)  # products with cos and sin, a half turned, their sum
    return (12 * hidden + 5 * wide + rotary + 4 * keys + 2 * queries) * shape.dtype.itemsize


def merge_bytes(plan: Plan) -> int:
    """Of a token in one merge: float32 in and out, and the other part."""
    return plan.shape.query_heads * plan.shape.head_dim * (8 + plan.shape.dtype.itemsize)


def memory_s(
    plan: Plan, calibration: float, compute: float, rates: PrefillRates, link_bytes_s: float
) -> float:
    """Launches held up by registering, and what making regions or the link take beyond the rest.

    Regions are made from calibration on; the first sequence needs the last one for its last layer.
    """
    gib, first = plan.needs.pinned / GIB, compute / plan.batch
    held = gib * rates.register_s_gib
    making = gib * rates.pin_s_gib + first / plan.shape.layers - (calibration + first + held)
    link = plan.needs.pinned / link_bytes_s - compute
    return held + max(0.0, making, link)
