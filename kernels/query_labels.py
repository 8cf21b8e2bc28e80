"""Query labels: what a step's query is compared with the label cache by.

The scores of the query heads that share a KV head are combined as softmax
masses, so each head also needs its normaliser. The exact one needs all keys;
this uses the log-sum-exp over the keys that are on the GPU anyway (sinks and
recent tokens), which is free of history and the same wherever rows come from.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .early_launch import early_launch, wait_for_inputs


def query_labels(
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
    """Query labels [B, Hq, R] and offsets [B, Hq]; shapes as in query_labels_reference."""
    run = query_labels_triton if query.is_cuda else query_labels_reference
    return run(query, query_map, key_mean, slots, lengths, sinks, recent, scale, include_current)


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
    in_sinks = (index < sinks) & (index < length - int(not include_current))
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


def query_labels_triton(
    query: torch.Tensor,
    query_map: torch.Tensor,
    key_mean: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    include_current: bool,
    block_channels: int = 16,
    block_rows: int = 128,
    num_warps: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; of a query head's programs the first sums over the local keys, the others project."""
    batch, heads, dim = query.shape
    channels = query_map.shape[1]
    kv_heads = key_mean.shape[0]
    assert query.stride(2) == 1
    assert slots[0, 0].is_contiguous()
    assert query_map.is_contiguous()
    assert key_mean.is_contiguous()
    dim_pad = triton.next_power_of_2(dim)
    # Keys of one step: at most 128 x 128 float32 numbers, 64 registers in each of 256 threads. All at once
    # take 4.1 us, 64 at a time with 128 threads 6.2 (H200).
    block = min(block_rows, 16384 // dim_pad, triton.next_power_of_2(sinks + recent))
    labels = torch.empty(batch, heads, channels, dtype=torch.float32, device=query.device)
    offsets = torch.empty(batch, heads, dtype=torch.float32, device=query.device)
    _query_labels_kernel[(batch * heads, 1 + channels // block_channels)](
        query, query_map, key_mean, slots, lengths, labels, offsets,
        query.stride(0), query.stride(1), slots.stride(0), slots.stride(1), scale,
        HEADS=heads, GROUP=heads // kv_heads, DIM=dim, DIM_PAD=dim_pad, R=channels,
        SINKS=sinks, RECENT=recent, INCLUDE_CURRENT=include_current,
        BLOCK=block, BLOCK_R=block_channels, num_warps=num_warps, **early_launch(query), **FUSED,
    )  # fmt: skip
    return labels, offsets


@triton.jit
def _query_labels_kernel(
    query, query_map, key_mean, slots, lengths, labels, offsets,
    query_b, query_h, slots_b, slots_h, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, R: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, INCLUDE_CURRENT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_b = (tl.program_id(0) // HEADS).to(tl.int64)
    i_q = tl.program_id(0) % HEADS
    i_h = (i_q // GROUP).to(tl.int64)
    o_d = tl.arange(0, DIM_PAD)
    m_d = o_d < DIM
    b_q = tl.load(query + i_b * query_b + i_q * query_h + o_d, mask=m_d, other=0.0)  # [D]
    b_q = b_q.to(tl.float32) * scale
    if tl.program_id(1) == 0:
        length = tl.load(lengths + i_b)
        p_rows = slots + i_b * slots_b + i_h * slots_h
        lse = _local_lse(b_q, p_rows, length, o_d, m_d, DIM, SINKS, RECENT, INCLUDE_CURRENT, BLOCK)
        b_mean = tl.load(key_mean + i_h * DIM + o_d, mask=m_d, other=0.0)  # [D]
        tl.store(offsets + tl.program_id(0), lse - tl.sum(b_q * b_mean, 0))
    else:
        o_r = (tl.program_id(1) - 1) * BLOCK_R + tl.arange(0, BLOCK_R)
        p_map = query_map + (i_q * R + o_r[:, None]).to(tl.int64) * DIM + o_d[None, :]
        b_map = tl.load(p_map, mask=m_d[None, :], other=0.0)  # [BLOCK_R, D]
        tl.store(labels + tl.program_id(0) * R + o_r, tl.sum(b_map * b_q[None, :], 1))


@triton.jit
def _local_lse(
    b_q, p_rows, length, o_d, m_d,
    DIM: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, INCLUDE_CURRENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """log-sum-exp of the scaled query over the sinks and the ring, -1e30 where there is no key."""
    newest_key = length - 1 if INCLUDE_CURRENT else length - 2  # the last position that has a row
    top = -1e30
    mass = 0.0
    for first in range(0, SINKS + RECENT, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        # A ring place holds the newest token of its residue; it counts if that token is recent.
        residue = o_n - SINKS
        back = length - 1 - residue
        newest = length - 1 - back % RECENT
        in_ring = (residue >= 0) & (residue < RECENT) & (back >= 0)
        in_ring = in_ring & (newest >= SINKS) & (newest <= newest_key)
        valid = in_ring | ((o_n < SINKS) & (o_n <= newest_key))
        p_key = p_rows + o_n[:, None].to(tl.int64) * (2 * DIM) + o_d[None, :]
        b_key = tl.load(p_key, mask=valid[:, None] & m_d[None, :], other=0.0)  # [BLOCK, D]
        logit = tl.sum(b_key.to(tl.float32) * b_q[None, :], 1)  # [BLOCK]
        logit = tl.where(valid, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 0))
        mass = mass * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top), 0)
        top = new_top
    return top + tl.log(tl.maximum(mass, 1.0))  # the top key alone weighs 1; without a key: -1e30
