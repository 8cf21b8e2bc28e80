"""The two parts of admission.py in thread block clusters, on GPUs that have them (sm_90 and newer).

Where select_cluster.cluster_select_available() is False, scores.label_scores and sticky.sticky_topk do the
same work at once.
"""

from collections.abc import Sequence

import torch

from .admission import Candidates
from .cluster_launch import (
    ADMITTING_SOURCES,
    CHOOSING_SOURCES,
    THREADS,
    Cluster,
    compiled,
    label_defines,
    launch,
)
from .select_cluster import cluster_sizes, dynamic_bytes

# CTAs that choose for one KV head, by phase. A prediction's choice has the time of a gather, so four leave
# more of the GPU to the model (7.43 ms a step for 7.50; two were late, 8.43: 262,144 tokens, H200). A layer
# waits for its true one.
CHOOSING_CTAS = (4, 8)


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
    slot_maps: Sequence[torch.Tensor],
    step: torch.Tensor,
    phase: int,
    kept_steps: int,
    misses: Sequence[torch.Tensor],
) -> None:
    """label_scores, admit_reference and, of what may enter, residency.resolve_reference, in one launch.

    Labels and rounding as in select_by_labels_cluster. slot_maps: slot_of_token, token_in_slot, stamps and
    hand; misses: miss_tokens, miss_slots, miss_counts and counters, all as in resolve_reference.
    """
    batch, kv_heads, capacity = codes.shape[:3]
    channels, group = query_labels.shape[2], query_labels.shape[1] // kv_heads
    defines = label_defines(channels, bits, group)
    sizes = cluster_sizes(batch * kv_heads, capacity, 2, dict(defines)["RESIDENT_THREADS"], entering.device)
    kernel = compiled("admit_cluster", ADMITTING_SOURCES, defines, sizes, entering.device.index)
    labels = (query_labels, offsets, codes, scales)
    lists = (entering, entering_counts, *candidates)
    tensors = (*labels, budgets, lengths, history, *lists, *slot_maps, step, *misses)
    limits = (sinks, recent, new_rows, int(attended))
    lengths_of_lists = (entering.shape[-1], candidates.tokens.shape[-1], slot_maps[1].shape[-1])
    numbers = (kv_heads, capacity, history.shape[-1], *limits, *lengths_of_lists, phase, kept_steps)
    launch(kernel, (batch, kv_heads), tensors, numbers)


def choose_in_clusters(
    candidates: Candidates,
    budgets: torch.Tensor,
    sinks: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor,
    slot_of_token: torch.Tensor,
    stamps: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    counters: torch.Tensor,
) -> None:
    """choose_reference, with the same bits."""
    batch, kv_heads, k_max = tokens.shape
    listed = candidates.tokens.shape[-1]
    # The candidates of a large budget may need the shared memory of more.
    ctas = dict.fromkeys((CHOOSING_CTAS[phase], max(CHOOSING_CTAS)))
    sizes = tuple(Cluster(count, THREADS, dynamic_bytes(listed, count, 1)) for count in ctas)
    kernel = compiled("choose_cluster", CHOOSING_SOURCES, (), sizes, tokens.device.index)
    tensors = (*candidates, budgets, history, tokens, counts, slots, slot_of_token, stamps, step, counters)
    numbers = (kv_heads, listed, history.shape[-1], sinks, int(attended), k_max)
    launch(kernel, (batch, kv_heads), tensors, (*numbers, slot_of_token.shape[-1], stamps.shape[-2], phase))
