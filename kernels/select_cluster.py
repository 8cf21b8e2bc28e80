"""Label scoring and exact top-k in one kernel, on GPUs with thread block clusters (sm_90 and newer).

Where cluster_select_available() is False, scores.label_scores and topk.select_topk do the same work. Sticky
selection is admit_cluster.py.
"""

import torch

from .cluster_launch import SCORING_SOURCES, STATIC_BYTES, Cluster, compiled, label_defines, launch
from .cuda_source import runs_hopper_source, shared_limit


def cluster_select_available(device: torch.device, capacity: int) -> bool:
    """Whether the cluster kernels can select from `capacity` tokens on this device."""
    if not runs_hopper_source(device):
        return False
    major = torch.cuda.get_device_capability(device)[0]
    largest = 16 if major in (9, 10) else 8  # sm_120 has no clusters of 16
    return dynamic_bytes(capacity, largest, 2) + STATIC_BYTES <= shared_limit(device)


def dynamic_bytes(tokens: int, cluster: int, bits: int) -> int:
    """Shared memory of a CTA: of each token of its share a key, and so many bits (chosen, a member)."""
    share = -(-tokens // (cluster * 32)) * 32
    return share * 4 + share // 8 * bits


def cluster_sizes(
    rows: int, capacity: int, bits: int, resident_threads: int, device: torch.device
) -> tuple[Cluster, ...]:
    """The better clusters first, for `rows` lists and resident_threads of label_defines.

    Few CTAs find their SMs sooner beside other work, and their exchanges are short: 8 of 1,024 threads take
    58 us where 16 of 512 take 60 (a sticky selection alone, H200), and leave half of the GPU to others. Many
    rows fill it anyway: two CTAs an SM, and steps of six sequences beside a prefill take 52 ms with 8 CTAs
    and 58 with 16 (8B shape, H100).
    """
    filled = 8 * rows >= torch.cuda.get_device_properties(device).multi_processor_count

    def cluster(ctas: int) -> Cluster:
        size = dynamic_bytes(capacity, ctas, bits)
        two_an_sm = 2 * (size + STATIC_BYTES) <= shared_limit(device)
        wide = resident_threads == 1024 and not (two_an_sm and (filled or ctas == 16))
        return Cluster(ctas, 1024 if wide else 512, size)

    return cluster(8), cluster(16)


def select_by_labels_cluster(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """label_scores and then select_topk.

    query_labels [B, Hq, R] and offsets [B, Hq] float32; codes [B, Hkv, N,
    code_width] and scales [B, Hkv, N, 2]: the label cache; budgets [B, Hkv] and
    lengths [B] int32; tokens [B, Hkv, K] and counts [B, Hkv] int32 are written. All tensors contiguous.
    Scores are rounded differently from label_scores (a relative 1e-6 or so), so
    tokens of nearly equal score may change places; the same input gives the same bits.
    """
    batch, kv_heads, capacity = codes.shape[:3]
    channels, group = query_labels.shape[2], query_labels.shape[1] // kv_heads
    defines = label_defines(channels, bits, group)
    sizes = cluster_sizes(batch * kv_heads, capacity, 1, dict(defines)["RESIDENT_THREADS"], tokens.device)
    kernel = compiled("select_cluster", SCORING_SOURCES, defines, sizes, tokens.device.index)
    tensors = (query_labels, offsets, codes, scales, budgets, lengths, tokens, counts)
    launch(kernel, (batch, kv_heads), tensors, (kv_heads, capacity, sinks, recent, tokens.shape[-1]))
