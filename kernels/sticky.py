"""Sticky selection: the k best-scored tokens, with at most `new_rows` of them new.

Members are the tokens of the last selections (remember.py). When more than
new_rows tokens of the exact top-k are no members, the selection is the new_rows
best of those outside and the best members. Tail tokens of nearly equal score
are interchangeable, so this holds the attention mass (bench/results/sticky_*.json)
while it bounds what a step has to bring over PCIe.
"""

import torch
import triton
import triton.language as tl

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

MARKED = 1024  # members a program marks


def sticky_topk_reference(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    previous_tokens: torch.Tensor,
    previous_counts: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Write the sticky selection of each sequence and KV head.

    scores [B, Hkv, N] float32; budgets [B, Hkv] int32: k of each KV head, at most
    K; lengths [B] int32; previous_tokens [B, Hkv, K'] and previous_counts [B, Hkv]
    int32: the members, each once, of which only selectable tokens count; -1 is a
    gap. tokens [B, Hkv, K] int32 (ascending, -1 past the count) and counts [B, Hkv]
    int32 as select_topk writes them; they may be the members' own buffers.
    Ties go to the earliest token. A selection always has k tokens: with fewer
    than k - new_rows members (none at the first step), others take their place.
    """
    previous, held = previous_tokens.clone(), previous_counts.tolist()
    tokens.fill_(-1)
    for b, length in enumerate(lengths.tolist()):
        end = max(sinks, length - recent)
        counts[b] = budgets[b].clamp(max=end - sinks)
        for h, count in enumerate(counts[b].tolist()):
            order = scores[b, h, sinks:end].sort(dim=-1, descending=True, stable=True).indices + sinks
            listed = previous[b, h, : held[b][h]].long()
            marked = torch.zeros(scores.shape[2], dtype=torch.bool, device=scores.device)
            marked[listed[listed >= 0]] = True
            member = marked[order]  # best first
            entering = max(new_rows, count - int(member.sum()))
            allowed = member | ((~member).cumsum(0) <= entering)
            tokens[b, h, :count] = order[allowed][:count].sort().values.int()


def sticky_topk_triton(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    previous_tokens: torch.Tensor,
    previous_counts: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """sticky_topk_reference in seven kernels: three radix selects (radix.py) side by side.

    Stream 0 is the exact top-k. It stands when few enough of it are new; else the
    selection is stream 1 (the best others) and stream 2 (the best members).
    """
    batch, kv_heads, capacity = scores.shape
    rows = batch * kv_heads
    # 32 tokens a thread spill registers here (ptxas, sm_90).
    chunk, blocks, warps, vec = radix_plan(rows, capacity, 16)
    hist, state, above = radix_scratch(3, rows, blocks, scores.device)
    members = torch.zeros(rows, capacity, dtype=torch.int8, device=scores.device)
    outside = torch.zeros(rows, dtype=torch.int32, device=scores.device)
    listed = previous_tokens.shape[-1]
    mark_members_kernel[(triton.cdiv(listed, MARKED), rows)](
        members, previous_tokens, previous_counts, capacity, listed, BLOCK=MARKED, num_warps=4
    )
    for digit in range(DIGITS):
        digit_kernel[(blocks, rows)](
            scores, members, budgets, lengths, hist, state, above,
            kv_heads, capacity, sinks, recent, new_rows,
            DIGIT=digit, STREAMS=3, CHUNK=chunk, VEC=vec, num_warps=warps,
        )  # fmt: skip
    count_outside_kernel[(blocks, rows)](
        scores, members, budgets, lengths, hist, state, above, outside,
        kv_heads, capacity, sinks, recent, CHUNK=chunk, VEC=vec, num_warps=warps,
    )  # fmt: skip
    compact_sticky_kernel[(blocks, rows)](
        scores, members, budgets, lengths, hist, state, above, outside, tokens, counts,
        kv_heads, capacity, sinks, recent, tokens.shape[-1], CHUNK=chunk, VEC=vec, num_warps=warps,
    )  # fmt: skip


@triton.jit
def mark_members_kernel(members, previous, counts, capacity, listed, BLOCK: tl.constexpr):
    """Set the bytes [rows, N] of the listed tokens; -1 is none."""
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    token = tl.load(previous + row * listed + index, mask=index < tl.load(counts + row), other=-1)
    inside = (token >= 0) & (token < capacity)
    tl.store(members + row * capacity + token, tl.full([BLOCK], 1, tl.int8), mask=inside)


@triton.jit
def count_outside_kernel(
    scores, members, budgets, lengths, hist, state, above, outside,
    kv_heads, capacity, sinks, recent, CHUNK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Count the tokens of the exact top-k that are outside the previous selection."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    _wanted, end = span_of_row(budgets, lengths, row, kv_heads, sinks, recent)
    if block * CHUNK < end:
        positions, selectable, key = load_keys(scores, row, block, capacity, sinks, end, CHUNK, VEC)
        member = tl.load(members + row.to(tl.int64) * capacity + positions, mask=selectable, other=1) != 0
        used = tl.cdiv(end, CHUNK)
        taken, _upto = rank_tokens(hist, state, above, key, selectable, 0, row, block, rows, blocks, used, 3)
        tl.atomic_add(outside + row, tl.sum((taken & ~member).to(tl.int32), 0), sem="relaxed")


@triton.jit
def compact_sticky_kernel(
    scores, members, budgets, lengths, hist, state, above, outside, tokens, counts,
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
        target = tokens + row.to(tl.int64) * k_max
        entering = tl.load(state + ((rows + row) * 4) * 2 + 1)  # what stream 1 looked for
        if tl.load(outside + row) > entering:
            member = tl.load(members + row.to(tl.int64) * capacity + positions, mask=selectable, other=0) != 0
            other = selectable & ~member
            new, new_upto = rank_tokens(hist, state, above, key, other, 1, row, block, rows, blocks, used, 3)
            member = selectable & member
            old, old_upto = rank_tokens(hist, state, above, key, member, 2, row, block, rows, blocks, used, 3)
            tl.store(target + new_upto + old_upto - 1, positions, mask=new | old)
        else:
            taken, upto = rank_tokens(
                hist, state, above, key, selectable, 0, row, block, rows, blocks, used, 3
            )
            tl.store(target + upto - 1, positions, mask=taken)


def sticky_topk(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    previous_tokens: torch.Tensor,
    previous_counts: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """sticky_topk_reference, on the GPU where the scores are there."""
    run = sticky_topk_triton if scores.is_cuda else sticky_topk_reference
    run(
        scores, budgets, new_rows, lengths, sinks, recent, previous_tokens, previous_counts, tokens, counts
    )  # fmt: skip
