"""Decode attention over sinks, selected rows and the recent ring, in token order.

The rows are read where they lie. The order of the sum is the order of the
tokens, never of the slots, so the result has the same bits whether a row was
resident, prefetched or fetched late.
"""

import torch
import triton
import triton.language as tl

from .attend_bulk import attend_bulk_available, sparse_attention_bulk
from .combine_pieces import combine_pieces


def sparse_attention(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to sinks, selection and recent tokens; shapes as in sparse_attention_reference."""
    run = sparse_attention_reference
    if query.is_cuda:
        bulk = attend_bulk_available(query, slots)
        run = sparse_attention_bulk if bulk else sparse_attention_triton
    return run(
        query, slots, tokens, counts, slot_of_token, lengths, sinks, recent, scale, softcap, sink_logits
    )


def sparse_attention_reference(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the sinks, the selection and the recent tokens; returns [B, Hq, D].

    query [B, Hq, D]; slots [B, Hkv, sinks + recent + n_slots, 2 D]; tokens
    [B, Hkv, K] ascending and counts [B, Hkv] int32: the selection; slot_of_token
    [B, Hkv, N] int32; lengths [B] int32, the current token included. softcap
    bounds logits as softcap * tanh(x / softcap), 0 for none; sink_logits [Hq]
    are learned logits that take mass without a value (GPT-OSS). A sequence of
    length 0 (an empty place) has nothing to attend to and gets zeros.
    """
    heads, dim = query.shape[1:]
    kv_heads = slots.shape[1]
    first_slot = sinks + recent
    out = torch.empty_like(query)
    for b, length in enumerate(lengths.tolist()):
        start = max(sinks, length - recent)
        ring = sinks + torch.arange(start, max(start, length), device=query.device) % recent
        sink = torch.arange(min(sinks, length), device=query.device)
        for h in range(kv_heads):
            chosen = tokens[b, h, : int(counts[b, h])].long()
            where = torch.cat([sink, slot_of_token[b, h, chosen].long() + first_slot, ring])
            rows = slots[b, h, where].float()  # [n, 2 D]
            group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
            logits = query[b, group].float() @ rows[:, :dim].T * scale  # [G, n]
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[group, None].float()], -1)
            mass = torch.softmax(logits, -1)[:, : len(where)]
            out[b, group] = (mass @ rows[:, dim:]).to(out.dtype)
    return out


def sparse_attention_triton(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    programs: int = 512,
    block_bytes: int = 8192,
    num_stages: int = 4,
    num_warps: int = 4,
) -> torch.Tensor:
    """Two launches: partial softmax sums over fixed pieces of the row list, then their combination.

    The list is sinks, selection, ring, in token order. How it is cut depends on
    shapes only (about `programs` pieces in all, four for each of an H100's 132
    SMs), so the bits of the result depend on the selection alone. A program
    reads block_bytes of keys at a time and as much of values. The defaults take 34.7 us for 16,384 rows of
    8 heads at 262,144 tokens, 16,384 bytes in two stages 44.3 (H100).
    """
    batch, heads, dim = query.shape
    kv_heads, budget = tokens.shape[1:]
    group = heads // kv_heads
    assert query.stride(2) == 1
    assert slots[0, 0].is_contiguous()
    assert tokens.is_contiguous()
    assert slot_of_token.stride(2) == 1
    dim_pad = triton.next_power_of_2(dim)
    block = min(max(block_bytes // (dim_pad * slots.element_size()), 16), 128)
    blocks = triton.cdiv(sinks + budget + recent, block)
    chunk = triton.cdiv(blocks, max(programs // (batch * kv_heads), 1)) * block
    splits = triton.cdiv(blocks * block, chunk)
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=query.device)
    tops = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, dim, dtype=query.dtype, device=query.device)
    _attend_kernel[(splits, batch * kv_heads)](
        query, slots, tokens, counts, slot_of_token, lengths, partial, tops[0], tops[1],
        query.stride(0), query.stride(1), slots.stride(0), slots.stride(1),
        slot_of_token.stride(0), slot_of_token.stride(1), budget, scale, softcap,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)),
        DIM=dim, DIM_PAD=dim_pad, SINKS=sinks, RECENT=recent, SPLITS=splits, CHUNK=chunk, BLOCK=block,
        SOFTCAP=softcap != 0.0, UPCAST=not query.is_cuda, STAGES=num_stages, num_warps=num_warps,
    )  # fmt: skip
    combine_pieces(partial, tops[0], tops[1], sink_logits, out)
    return out


@triton.jit
def _attend_kernel(
    query, slots, tokens, counts, slot_of_token, lengths, partial, tops, sums,
    query_b, query_h, slots_b, slots_h, map_b, map_h, budget, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    i_split = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_h = (i_bh % KV_HEADS).to(tl.int64)
    length = tl.load(lengths + i_b)
    count = tl.load(counts + i_bh)
    # The row list: n_sinks sinks, then count selected rows, then the ring from ring_start on.
    n_sinks = tl.minimum(SINKS, length)
    ring_start = tl.maximum(SINKS, length - RECENT)
    total = n_sinks + count + tl.maximum(length - ring_start, 0)
    last = tl.minimum(i_split * CHUNK + CHUNK, total)

    o_g = tl.arange(0, GROUP_PAD)
    m_g = o_g < GROUP
    o_d = tl.arange(0, DIM_PAD)
    m_d = o_d < DIM
    p_query = query + i_b * query_b + (i_h * GROUP + o_g[:, None]) * query_h + o_d[None, :]
    b_query = tl.load(p_query, mask=m_g[:, None] & m_d[None, :], other=0.0)  # [G, D]
    if UPCAST:  # the interpreter's tl.dot is wrong on bfloat16 (it multiplies the bit patterns)
        b_query = b_query.to(tl.float32)
    p_rows = slots + i_b * slots_b + i_h * slots_h
    p_tokens = tokens + i_bh.to(tl.int64) * budget
    p_map = slot_of_token + i_b * map_b + i_h * map_h

    b_top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    b_sum = tl.zeros([GROUP_PAD], tl.float32)
    b_out = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for first in tl.range(i_split * CHUNK, last, BLOCK, num_stages=STAGES):
        o_n = first + tl.arange(0, BLOCK)
        m_n = o_n < last
        o_k = o_n - n_sinks
        m_k = m_n & (o_k >= 0) & (o_k < count)
        b_token = tl.load(p_tokens + o_k, mask=m_k, other=0)  # [BLOCK]
        b_slot = tl.load(p_map + b_token, mask=m_k, other=0)
        b_ring = SINKS + (ring_start + o_k - count) % RECENT
        b_place = tl.where(m_k, SINKS + RECENT + b_slot, tl.where(o_k < 0, o_n, b_ring)).to(tl.int64)
        p_key = p_rows + b_place[:, None] * (2 * DIM) + o_d[None, :]
        m_row = m_n[:, None] & m_d[None, :]
        b_key = tl.load(p_key, mask=m_row, other=0.0)  # [BLOCK, D]
        b_value = tl.load(p_key + DIM, mask=m_row, other=0.0)  # [BLOCK, D]
        if UPCAST:
            b_key = b_key.to(tl.float32)
            b_value = b_value.to(tl.float32)
        b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale  # [G, BLOCK]
        if SOFTCAP:
            b_logit = softcap * (1 - 2 / (tl.exp2(b_logit * (2 * LOG2E / softcap)) + 1))
        b_logit = tl.where(m_n[None, :], b_logit * LOG2E, float("-inf"))
        b_new_top = tl.maximum(b_top, tl.max(b_logit, 1))
        b_shrink = tl.exp2(b_top - b_new_top)
        b_mass = tl.exp2(b_logit - b_new_top[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_mass, 1)
        b_out = b_out * b_shrink[:, None]
        b_out = tl.dot(b_mass.to(b_value.dtype), b_value, b_out, input_precision="ieee")
        b_top = b_new_top

    # A piece past the end leaves top = -inf; its sums and values are then never read.
    o_part = (i_bh * GROUP + o_g).to(tl.int64) * SPLITS + i_split
    tl.store(tops + o_part, b_top, mask=m_g)
    if i_split * CHUNK < total:
        tl.store(sums + o_part, b_sum, mask=m_g)
        p_partial = partial + o_part[:, None] * DIM + o_d[None, :]
        tl.store(p_partial, b_out, mask=m_g[:, None] & m_d[None, :])
