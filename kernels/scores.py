"""Label scores: one number per token and KV head, the guess of its attention mass.

score(t) = log sum over the group's query heads g of exp(ql_g . label_t - offset_g).
A KV head's rows are fetched once for all its query heads, so the best set of k
tokens is the one with the largest summed softmax mass; the log keeps the order
and cannot overflow.
"""

import torch
import triton
import triton.language as tl

from .labels import read_labels


def label_scores_reference(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scores: torch.Tensor,
) -> None:
    """Fill scores [B, Hkv, N] float32 for every selectable token; others get -inf.

    query_labels [B, Hq, R] and offsets [B, Hq] as query_labels() returns them;
    codes [B, Hkv, N, code_width] and scales [B, Hkv, N, 2]: the label cache;
    lengths [B] int32. Selectable are the tokens sinks <= t < length - recent.
    """
    batch, kv_heads, capacity = scores.shape
    group = query_labels.shape[1] // kv_heads
    ql = query_labels.view(batch, kv_heads, group, -1)  # [B, Hkv, G, R]
    scores.fill_(float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        if length - recent <= sinks:
            continue
        span = slice(sinks, length - recent)
        labels = read_labels(codes[b, :, span], scales[b, :, span], bits)  # [Hkv, T, R]
        mass = torch.einsum("hgr,htr->hgt", ql[b], labels) - offsets[b].view(kv_heads, group, 1)
        scores[b, :, span] = torch.logsumexp(mass, 1)
