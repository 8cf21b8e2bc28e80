"""Prefill attention with what flash attention in PyTorch does not take: a softcap, with or without a window.

One program attends with a block of one head's queries and walks the keys that the
block can see with a running softmax; nothing of size S x S. Keys are read where the
prefill keeps them, heads of a group share them.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED

# Tiles by head_dim, (queries, keys, warps): q, two stages of k and v and the weights stay below the 99 KiB
# that a block may have on sm_86, sm_89 and sm_120 (tests/aot_compile.py compiles and checks it).
TILES = {64: (128, 64, 8), 128: (128, 64, 8), 256: (64, 32, 8)}
LARGEST_DIM = 256


def masked_prefill_triton(
    query: torch.Tensor, rows: torch.Tensor, scale: float, window: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with the last T of E positions; returns out [1, T, Hq, D] and lse [1, Hq, T] float32.

    query [1, Hq, T, D]; rows [Hkv, E, >= 2 D]; window: keys a query sees, itself included,
    0 for all; softcap: logits become softcap * tanh(x / softcap), 0 for none.
    """
    _, heads, count, dim = query.shape
    kv_heads, end, _ = rows.shape
    assert query.stride(3) == rows.stride(2) == 1
    dim_pad = max(16, triton.next_power_of_2(dim))
    block_m, block_n, warps = TILES[max(dim_pad, 64)]
    if query.dtype == torch.float32:
        block_m, block_n = block_m // 2, block_n // 2
    out = torch.empty(1, count, heads, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(1, heads, count, dtype=torch.float32, device=query.device)
    _masked_prefill_kernel[(triton.cdiv(count, block_m), heads)](
        query, rows, out, lse, query.stride(1), query.stride(2), rows.stride(0), rows.stride(1),
        count, end, window, scale, softcap,
        HEADS=heads, GROUP=heads // kv_heads, DIM=dim, DIM_PAD=dim_pad, BLOCK_M=block_m, BLOCK_N=block_n,
        WINDOW=window != 0, SOFTCAP=softcap != 0.0, UPCAST=not query.is_cuda, num_warps=warps, num_stages=2,
        **FUSED,
    )  # fmt: skip
    return out, lse


@triton.jit
def _masked_prefill_kernel(
    query, rows, out, lse, query_h, query_t, rows_h, rows_t, count, end, window, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < count
    o_d = tl.arange(0, DIM_PAD)
    m_d = o_d < DIM
    o_place = end - count + o_m  # positions of the queries
    p_query = query + i_h * query_h + o_m[:, None].to(tl.int64) * query_t + o_d[None, :]
    b_query = tl.load(p_query, mask=m_m[:, None] & m_d[None, :], other=0.0)  # [BLOCK_M, D]
    if UPCAST:  # the interpreter's tl.dot is wrong on bfloat16 (it multiplies the bit patterns)
        b_query = b_query.to(tl.float32)
    p_rows = rows + (i_h // GROUP) * rows_h + o_d[None, :]

    # The keys that the block's queries see: from the first one's window to the last one itself.
    last = tl.minimum(end - count + start + BLOCK_M, end)
    first = 0
    if WINDOW:
        first = tl.maximum(end - count + start - window + 1, 0) // BLOCK_N * BLOCK_N
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    for i_n in range(first, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_row = (o_n < last)[:, None] & m_d[None, :]
        p_key = p_rows + o_n[:, None].to(tl.int64) * rows_t
        b_key = tl.load(p_key, mask=m_row, other=0.0)  # [BLOCK_N, D]
        b_value = tl.load(p_key + DIM, mask=m_row, other=0.0)  # [BLOCK_N, D]
        if UPCAST:
            b_key = b_key.to(tl.float32)
            b_value = b_value.to(tl.float32)
        b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if SOFTCAP:  # softcap * tanh(x / softcap)
            b_logit = softcap * (1 - 2 / (tl.exp2(b_logit * (2 * LOG2E / softcap)) + 1))
        m_seen = o_n[None, :] <= o_place[:, None]
        if WINDOW:
            m_seen = m_seen & (o_n[None, :] > o_place[:, None] - window)
        b_logit = tl.where(m_seen, b_logit * LOG2E, float("-inf"))
        b_new_top = tl.maximum(b_top, tl.max(b_logit, 1))
        b_safe = tl.where(b_new_top == float("-inf"), 0.0, b_new_top)  # a tile may hide all keys of a query
        b_shrink = tl.exp2(b_top - b_safe)
        b_mass = tl.exp2(b_logit - b_safe[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_mass, 1)
        b_out = b_out * b_shrink[:, None]
        b_out = tl.dot(b_mass.to(b_value.dtype), b_value, b_out, input_precision="ieee")
        b_top = b_new_top

    b_sum = tl.where(m_m, b_sum, 1.0)  # a query sees itself; those past the end may see nothing
    b_top = tl.where(m_m, b_top, 0.0)
    b_out = b_out / b_sum[:, None]
    p_out = out + (o_m[:, None].to(tl.int64) * HEADS + i_h) * DIM + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    tl.store(lse + i_h * count + o_m, (b_top + tl.log2(b_sum)) / LOG2E, mask=m_m)
