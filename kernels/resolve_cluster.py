"""Resolve with a thread block cluster for each (sequence, KV head), on sm_90 and newer.

The Triton version has one CTA for each, which waits for memory most of the time: 58 us for 16,384 tokens a
head on an H100. The CUDA source is compiled at first use through CuPy's
RawModule: call it once before a CUDA graph captures it.
"""

import torch

from .cluster_launch import LIST_SOURCES, THREADS, Cluster, compiled, launch

CLUSTER = 8  # CTAs; the most that every GPU with clusters can place


def resolve_in_clusters(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    attended: bool,
    kept_steps: int,
    part: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """residency.resolve_reference with the same bits; all tensors contiguous."""
    batch, kv_heads, k_max = tokens.shape
    tensors = (
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step,
        miss_tokens, miss_slots, miss_counts, counters,
    )  # fmt: skip
    sizes = (slot_of_token.shape[-1], token_in_slot.shape[-1])
    numbers = (kv_heads, k_max, *sizes, phase, int(attended), kept_steps, part)
    size = Cluster(CLUSTER, THREADS, 0)
    kernel = compiled("resolve_cluster", LIST_SOURCES, (), (size,), tokens.device.index)
    launch(kernel, (batch, kv_heads), tensors, numbers)
