"""Select the k best-scored tokens of each KV head, in ascending token order.

Exact: every token above the k-th score is taken, and of those equal to it the
earliest. Ascending order lets the gather walk host memory forwards (PCIe
address translation: 2 to 3 times the rate of random order at 1 GiB and more)
and makes attention independent of where a row lies.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .radix import (
    DIGITS,
    digit_kernel,
    fill_rest,
    load_keys,
    radix_plan,
    radix_scratch,
    rank_tokens,
    span_of_row,
)


def select_topk_reference(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Write the selection of each sequence and KV head.

    scores [B, Hkv, N] float32; budgets [B, Hkv] int32: k of each KV head, at
    most K; lengths [B] int32; tokens [B, Hkv, K] int32 gets the selected
    positions, ascending, -1 past the count; counts [B, Hkv] int32 gets
    min(k, selectable tokens).
    """
    tokens.fill_(-1)
    for b, length in enumerate(lengths.tolist()):
        end = max(sinks, length - recent)
        counts[b] = budgets[b].clamp(max=end - sinks)
        order = scores[b, :, sinks:end].sort(dim=-1, descending=True, stable=True).indices  # [Hkv, T]
        for h, count in enumerate(counts[b].tolist()):
            tokens[b, h, :count] = order[h, :count].sort().values.int() + sinks


def select_topk_triton(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """select_topk_reference as five launches of a radix select (radix.py)."""
    batch, kv_heads, capacity = scores.shape
    rows = batch * kv_heads
    chunk, blocks, warps, vec = radix_plan(rows, capacity, 32)
    hist, state, above = radix_scratch(1, rows, blocks, scores.device)
    for digit in range(DIGITS):
        digit_kernel[(blocks, rows)](
            scores, scores, scores, budgets, lengths, hist, state, above,
            kv_heads, capacity, 0, sinks, recent, 0,
            DIGIT=digit, STREAMS=1, CHUNK=chunk, VEC=vec, num_warps=warps, **FUSED,
        )  # fmt: skip
    compact_kernel[(blocks, rows)](
        scores, budgets, lengths, hist, state, above, tokens, counts,
        kv_heads, capacity, sinks, recent, tokens.shape[-1], CHUNK=chunk, VEC=vec, num_warps=warps, **FUSED,
    )  # fmt: skip


@triton.jit
def compact_kernel(
    scores, budgets, lengths, hist, state, above, tokens, counts,
    kv_heads, capacity, sinks, recent, k_max, CHUNK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write a block's selected tokens to their places, and -1 past the count."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    count, end = span_of_row(budgets, lengths, row, kv_heads, sinks, recent)
    fill_rest(tokens, row, block, blocks, count, k_max)
    if block == 0:
        tl.store(counts + row, count)
    if block * CHUNK < end:
        used = tl.cdiv(end, CHUNK)
        positions, selectable, key = load_keys(scores, row, block, capacity, sinks, end, CHUNK, VEC)
        taken, upto = rank_tokens(hist, state, above, key, selectable, 0, row, block, rows, blocks, used, 1)
        tl.store(tokens + row.to(tl.int64) * k_max + upto - 1, positions, mask=taken)


def select_topk(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """select_topk_reference, on the GPU where the scores are there."""
    run = select_topk_triton if scores.is_cuda else select_topk_reference
    run(scores, budgets, lengths, sinks, recent, tokens, counts)
