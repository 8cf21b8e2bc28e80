"""Sticky selection: the k best-scored tokens, with at most `new_rows` of them new.

Members are the tokens of the last selections (history.py). When more than new_rows tokens of the exact
top-k are no members, the selection is the new_rows best of those outside and the best members. Tail tokens
of nearly equal score are interchangeable, so this holds the attention mass while it bounds what a step has to
bring over PCIe.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .history import REMEMBERED, count_ages_kernel, load_past, members_of, remembered_bits
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


def sticky_topk_reference(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Write the sticky selection of each sequence and KV head.

    scores [B, Hkv, N] float32; budgets [B, Hkv] int32: k of each KV head, at most
    K; lengths [B] int32; history [B, Hkv, P] uint8, of history.py's
    empty_history. attended: this selection is the step's, so the history takes it in; else (a
    prediction) it stays as it is. tokens [B, Hkv, K] int32
    (ascending, -1 past the count) and counts [B, Hkv] int32 as select_topk writes them.
    Ties go to the earliest token. A selection always has k tokens: with fewer
    than k - new_rows members (none at the first step), others take their place.
    """
    tokens.fill_(-1)
    for b, length in enumerate(lengths.tolist()):
        end = max(sinks, length - recent)
        counts[b] = budgets[b].clamp(max=end - sinks)
        for h, count in enumerate(counts[b].tolist()):
            order = scores[b, h, sinks:end].sort(dim=-1, descending=True, stable=True).indices + sinks
            member = members_of(history[b, h, : end - sinks], count, new_rows)[order - sinks]  # best first
            entering = max(new_rows, count - int(member.sum()))
            allowed = member | ((~member).cumsum(0) <= entering)
            chosen = order[allowed][:count].sort().values
            tokens[b, h, :count] = chosen.int()
            if attended:
                history[b, h, : end - sinks] <<= 1
                history[b, h, chosen - sinks] |= 1


def sticky_topk_triton(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """sticky_topk_reference in seven kernels: three radix selects (radix.py) side by side.

    Stream 0 is the exact top-k. It stands when few enough of it are new; else the
    selection is stream 1 (the best others) and stream 2 (the best members).
    """
    batch, kv_heads, capacity = scores.shape
    rows, pitch = batch * kv_heads, history.shape[-1]
    # 32 tokens a thread spill registers here (ptxas, sm_90).
    chunk, blocks, warps, vec = radix_plan(rows, capacity, 16)
    hist, state, above = radix_scratch(3, rows, blocks, scores.device)
    ages = torch.zeros(rows, REMEMBERED, dtype=torch.int32, device=scores.device)
    outside = torch.zeros(rows, dtype=torch.int32, device=scores.device)
    count_ages_kernel[(blocks, rows)](
        history, lengths, ages, kv_heads, pitch, sinks, recent, CHUNK=chunk, num_warps=warps, **FUSED,
    )  # fmt: skip
    for digit in range(DIGITS):
        digit_kernel[(blocks, rows)](
            scores, history, ages, budgets, lengths, hist, state, above,
            kv_heads, capacity, pitch, sinks, recent, new_rows,
            DIGIT=digit, STREAMS=3, CHUNK=chunk, VEC=vec, num_warps=warps, **FUSED,
        )  # fmt: skip
    count_outside_kernel[(blocks, rows)](
        scores, history, ages, budgets, lengths, hist, state, above, outside,
        kv_heads, capacity, pitch, sinks, recent, new_rows, CHUNK=chunk, VEC=vec, num_warps=warps, **FUSED,
    )  # fmt: skip
    compact_sticky_kernel[(blocks, rows)](
        scores, history, ages, budgets, lengths, hist, state, above, outside, tokens, counts,
        kv_heads, capacity, pitch, sinks, recent, new_rows, tokens.shape[-1],
        ATTENDED=attended, CHUNK=chunk, VEC=vec, num_warps=warps, **FUSED,
    )  # fmt: skip


@triton.jit
def count_outside_kernel(
    scores, history, ages, budgets, lengths, hist, state, above, outside,
    kv_heads, capacity, pitch, sinks, recent, new_rows, CHUNK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Count the tokens of the exact top-k that are outside of the members."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    wanted, end = span_of_row(budgets, lengths, row, kv_heads, sinks, recent)
    if block * CHUNK < end:
        positions, selectable, key = load_keys(scores, row, block, capacity, sinks, end, CHUNK, VEC)
        past = load_past(history, row, pitch, sinks, positions, selectable)
        member = (past & remembered_bits(ages, row, wanted, new_rows)) != 0
        used = tl.cdiv(end, CHUNK)
        taken, _upto = rank_tokens(hist, state, above, key, selectable, 0, row, block, rows, blocks, used, 3)
        tl.atomic_add(outside + row, tl.sum((taken & ~member).to(tl.int32), 0), sem="relaxed")


@triton.jit
def compact_sticky_kernel(
    scores, history, ages, budgets, lengths, hist, state, above, outside, tokens, counts,
    kv_heads, capacity, pitch, sinks, recent, new_rows, k_max,
    ATTENDED: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write a block's selected tokens to their places, -1 past the count, and its part of the history."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    count, end = span_of_row(budgets, lengths, row, kv_heads, sinks, recent)
    fill_rest(tokens, row, block, blocks, count, k_max)
    if block == 0:
        tl.store(counts + row, count)
    if block * CHUNK < end:
        used = tl.cdiv(end, CHUNK)
        positions, selectable, key = load_keys(scores, row, block, capacity, sinks, end, CHUNK, VEC)
        past = load_past(history, row, pitch, sinks, positions, selectable)
        entering = tl.load(state + ((rows + row) * 4) * 2 + 1)  # what stream 1 looked for
        if tl.load(outside + row) > entering:
            member = (past & remembered_bits(ages, row, count, new_rows)) != 0
            other = selectable & ~member
            new, new_upto = rank_tokens(hist, state, above, key, other, 1, row, block, rows, blocks, used, 3)
            member = selectable & member
            old, old_upto = rank_tokens(hist, state, above, key, member, 2, row, block, rows, blocks, used, 3)
            taken, upto = new | old, new_upto + old_upto
        else:
            taken, upto = rank_tokens(
                hist, state, above, key, selectable, 0, row, block, rows, blocks, used, 3
            )
        tl.store(tokens + row.to(tl.int64) * k_max + upto - 1, positions, mask=taken)
        if ATTENDED:
            entries = history + row.to(tl.int64) * pitch + positions - sinks
            tl.store(entries, ((past << 1) & 255 | taken.to(tl.int32)).to(tl.uint8), mask=selectable)


def sticky_topk(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """sticky_topk_reference, on the GPU where the scores are there."""
    run = sticky_topk_triton if scores.is_cuda else sticky_topk_reference
    run(scores, budgets, new_rows, lengths, sinks, recent, history, attended, tokens, counts)
