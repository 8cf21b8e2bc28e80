"""The two parts of admission.py in thread block clusters, on GPUs that have them (sm_90 and newer).

Where select_cluster.cluster_select_available() is False, scores.label_scores and sticky.sticky_topk do the
same work at once.
"""

import torch

from .admission import Candidates
from .cluster_launch import SCORING_SOURCES, TOPK_SOURCES, compiled, label_defines, launch
from .select_cluster import cluster_sizes, dynamic_bytes

CHOICE_CLUSTER = 8  # CTAs; 32,768 candidates are 4,096 each, and every GPU with clusters can place it


def admit_in_clusters(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    history: torch.Tensor,
    attended: bool,
    entering: torch.Tensor,
    entering_counts: torch.Tensor,
    candidates: Candidates,
) -> None:
    """label_scores and then admit_reference; labels and rounding as in select_by_labels_cluster."""
    batch, kv_heads, capacity = codes.shape[:3]
    channels, group = query_labels.shape[2], query_labels.shape[1] // kv_heads
    sizes = cluster_sizes(batch * kv_heads, capacity, 2, entering.device)
    sources, defines = (*SCORING_SOURCES, "member_bits.cuh"), label_defines(channels, bits, group)
    kernel = compiled("admit_cluster", sources, defines, sizes, entering.device.index)
    labels = (query_labels, offsets, codes, scales)
    tensors = (*labels, budgets, lengths, history, entering, entering_counts, *candidates)
    limits = (sinks, recent, new_rows, int(attended))
    sizes_of_lists = (entering.shape[-1], candidates.tokens.shape[-1])
    launch(
        kernel, (batch, kv_heads), tensors, (kv_heads, capacity, history.shape[-1], *limits, *sizes_of_lists)
    )


def choose_in_clusters(
    candidates: Candidates,
    budgets: torch.Tensor,
    sinks: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """choose_reference, with the same bits."""
    batch, kv_heads, k_max = tokens.shape
    listed = candidates.tokens.shape[-1]
    size = (CHOICE_CLUSTER, dynamic_bytes(listed, CHOICE_CLUSTER, 1))
    kernel = compiled("choose_cluster", TOPK_SOURCES, (), (size,), tokens.device.index)
    tensors = (*candidates, budgets, history, tokens, counts)
    launch(
        kernel, (batch, kv_heads), tensors, (kv_heads, listed, history.shape[-1], sinks, int(attended), k_max)
    )
