"""Query labels: what a step's query is compared with the label cache by.

The scores of the query heads that share a KV head are combined as softmax
masses, so each head also needs its normaliser. The exact one needs all keys;
this uses the log-sum-exp over the keys that are on the GPU anyway (sinks and
recent tokens), which is free of history and the same wherever rows come from.
"""

import torch
import triton
import triton.language as tl


def query_labels_reference(
    query: torch.Tensor,
    query_map: torch.Tensor,
    key_mean: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    include_current: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project queries into label space and estimate their softmax normalisers.

    query [B, Hq, D] (after RoPE); query_map [Hq, R, D] and key_mean [Hkv, D]
    float32; slots [B, Hkv, sinks + recent + resident, 2 D]: rows on the GPU;
    lengths [B] int32: tokens so far, the current one included. A predicted
    query comes before its layer's current key, so it has include_current=False.
    Returns query labels [B, Hq, R] float32, softmax scale applied, and offsets
    [B, Hq] float32: the head's mass on token t is about exp(ql . label - offset).
    """
    batch, heads, dim = query.shape
    kv_heads = key_mean.shape[0]
    q = query.float() * scale
    labels = torch.einsum("bhd,hrd->bhr", q, query_map)  # [B, Hq, R]
    grouped = q.view(batch, kv_heads, heads // kv_heads, dim)  # [B, Hkv, G, D]
    local_keys = slots[:, :, : sinks + recent, :dim].float()  # [B, Hkv, sinks + recent, D]
    index = torch.arange(sinks + recent, device=query.device)
    length = lengths[:, None].long()
    in_sinks = (index < sinks) & (index < length - (not include_current))
    # A ring place holds the newest token of its residue; it counts if that token is recent.
    newest = length - 1 - (length - 1 - (index - sinks)) % recent
    in_ring = (index >= sinks) & (newest >= sinks) & (newest >= length - recent) & (newest >= 0)
    if not include_current:
        in_ring &= newest < length - 1
    valid = in_sinks | in_ring  # [B, sinks + recent]
    logits = torch.einsum("bhgd,bhnd->bhgn", grouped, local_keys.nan_to_num())
    logits = logits.masked_fill(~valid[:, None, None, :], float("-inf"))
    local_lse = torch.logsumexp(logits, -1).clamp_min(-1e30)  # [B, Hkv, G]
    mean_logit = torch.einsum("bhgd,hd->bhg", grouped, key_mean)
    return labels, (local_lse - mean_logit).reshape(batch, heads)
