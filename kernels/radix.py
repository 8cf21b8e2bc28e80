"""Radix select over float scores: the passes that select_topk and sticky_topk share.

Each score becomes a uint32 key of the same order, and four launches fix the k-th
key 8 bits at a time. A program owns CHUNK tokens of one (sequence, KV head) row
and writes the 256-bin histogram of the digit at hand over its tokens that match
the digits fixed so far. Every program of the next launch sums the row's block
histograms and finds the digit again for itself: no launch waits for a host, for
an atomic total or for another program. The per-block counts also give each block
its place in the output, so the compaction needs no counting pass.

Several selections run at once as streams: 0 over all tokens, and for sticky
selection 1 over the tokens outside of its members and 2 over those.
"""

import torch
import triton
import triton.language as tl

from .history import load_past, remembered_bits

DIGITS = 4  # 8 bits each: tl.histogram costs about bins / 32 operations a token, so not wider


def radix_plan(rows: int, capacity: int, thread_tokens: int) -> tuple[int, int, int, int]:
    """(tokens a program, programs a row, warps a program, tokens a load) for [rows, capacity] scores.

    About 128 programs in all (one for each SM of an H100), of at least 2,048
    tokens and at most 512 threads of thread_tokens.
    """
    share = triton.next_power_of_2(max(1, rows * capacity // 128))
    chunk = min(512 * thread_tokens, max(2048, share))
    warps = max(4, chunk // (32 * thread_tokens))
    return chunk, triton.cdiv(capacity, chunk), warps, 1 if capacity % 16 else 4


def radix_scratch(
    streams: int, rows: int, blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised histograms (this digit and the one before), states and block counts, int32.

    [2, streams, rows, blocks, 256], [streams, rows, DIGITS, 2] (keys fixed so far,
    tokens still wanted among those that match) and [streams, rows, blocks]
    (tokens above the threshold by the digits before the last).
    """
    return (
        torch.empty(2, streams, rows, blocks, 256, dtype=torch.int32, device=device),
        torch.empty(streams, rows, DIGITS, 2, dtype=torch.int32, device=device),
        torch.empty(streams, rows, blocks, dtype=torch.int32, device=device),
    )


@triton.jit
def order_key(score):
    """A uint32 of the same order as the float32 score; -0.0 equals 0.0, NaN comes first."""
    bits = score.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits).to(tl.uint32)
    bits = tl.where(score != score, 0x7FC00000, bits).to(tl.uint32)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000).to(tl.uint32)


@triton.jit
def span_of_row(budgets, lengths, row, kv_heads, sinks, recent):
    """(tokens wanted, end of the selectable span) of a row."""
    end = tl.maximum(tl.load(lengths + row // kv_heads) - recent, sinks)
    return tl.minimum(tl.load(budgets + row), end - sinks), end


@triton.jit
def load_keys(scores, row, block, capacity, sinks, end, CHUNK: tl.constexpr, VEC: tl.constexpr):
    """(positions, selectable, keys) of a block's tokens.

    Scores outside the span never count. The load's mask is constant over VEC
    tokens, so that it compiles to 16-byte loads (VEC 4) where rows are aligned.
    """
    positions = block * CHUNK + tl.arange(0, CHUNK)  # [CHUNK]
    selectable = (positions >= sinks) & (positions < end)
    base = scores + row.to(tl.int64) * capacity
    near = positions // VEC < tl.cdiv(end, VEC)
    return positions, selectable, order_key(tl.load(base + positions, mask=near, other=0.0))


@triton.jit
def row_histogram(hist, used):
    """[256] totals of `used` consecutive block histograms."""
    bins = tl.arange(0, 256)
    total = tl.zeros([256], tl.int32)
    for first in range(0, used, 16):
        block = first + tl.arange(0, 16)
        tile = hist + block[:, None] * 256 + bins[None, :]  # [16, 256]
        total += tl.sum(tl.load(tile, mask=(block < used)[:, None], other=0), 0)
    return total


@triton.jit
def histogram_of_stream(hist, stream, row, rows, blocks, DIGIT: tl.constexpr, STREAMS: tl.constexpr):
    """Where a row's first block histogram of a digit lies; digits take turns in two buffers."""
    return hist + (((DIGIT % 2) * STREAMS + stream) * rows + row).to(tl.int64) * blocks * 256


@triton.jit
def fix_digit(total, prefix, wanted, DIGIT: tl.constexpr):
    """(digit, prefix with it, tokens wanted among those that match it)."""
    bins = tl.arange(0, 256)
    at_least = tl.cumsum(total, 0, reverse=True)  # [256] tokens of this digit or above
    digit = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(bins > digit, total, 0), 0)
    return digit, prefix | (digit.to(tl.uint32) << (24 - 8 * DIGIT)), wanted - above


@triton.jit
def stream_share(stream: tl.constexpr, wanted, members, selectable, new_rows):
    """Tokens a stream looks for: all k; at most new_rows others; the members that fill up.

    With fewer members than k - new_rows (the first step, a grown budget), others
    take their place: a selection always has k tokens.
    """
    entering = tl.minimum(tl.maximum(new_rows, wanted - members), wanted)
    share = wanted
    if stream == 1:
        share = tl.minimum(entering, selectable - members)
    elif stream == 2:
        share = wanted - entering
    return share


@triton.jit
def write_histogram(hist, digit, match, CHUNK: tl.constexpr, SPARSE: tl.constexpr):
    """Histogram of a block's matching digits: by warp votes, or by atomics where few match."""
    bins = tl.arange(0, 256)
    if SPARSE:
        tl.store(hist + bins, tl.zeros([256], tl.int32))
        tl.debug_barrier()
        tl.atomic_add(hist + digit, tl.full([CHUNK], 1, tl.int32), mask=match, sem="relaxed")
    else:
        counts = tl.histogram(tl.where(match, digit, 0), 256)
        others = CHUNK - tl.sum(match.to(tl.int32), 0)  # counted as digit 0 above
        tl.store(hist + bins, counts - tl.where(bins == 0, others, 0))


@triton.jit
def digit_kernel(
    scores, history, ages, budgets, lengths, hist, state, above,
    kv_heads, capacity, pitch, sinks, recent, new_rows,
    DIGIT: tl.constexpr, STREAMS: tl.constexpr, CHUNK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Histogram of one digit of every stream; first fixes the digit before it."""
    block, row = tl.program_id(0), tl.program_id(1)
    blocks, rows = tl.num_programs(0), tl.num_programs(1)
    wanted, end = span_of_row(budgets, lengths, row, kv_heads, sinks, recent)
    if (block > 0) & (block * CHUNK >= end):
        return
    used = tl.maximum(tl.cdiv(end, CHUNK), 1)
    positions, selectable, key = load_keys(scores, row, block, capacity, sinks, end, CHUNK, VEC)
    digit = ((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32)
    n_members = 0
    if STREAMS == 3:
        past = load_past(history, row, pitch, sinks, positions, selectable)
        member = (past & remembered_bits(ages, row, wanted, new_rows)) != 0
        if DIGIT == 1:
            base = histogram_of_stream(hist, 2, row, rows, blocks, 0, STREAMS)
            n_members = tl.sum(row_histogram(base, used), 0)
    for stream in tl.static_range(STREAMS):
        match = selectable
        if stream == 1:
            match = match & ~member
        elif stream == 2:
            match = match & member
        if DIGIT > 0:
            share = stream_share(stream, wanted, n_members, end - sinks, new_rows)
            prefix = advance(
                hist, state, above, share, stream, row, block, rows, blocks, used, DIGIT, STREAMS
            )
            match = match & ((key >> (32 - 8 * DIGIT)) == (prefix >> (32 - 8 * DIGIT)))
        target = histogram_of_stream(hist, stream, row, rows, blocks, DIGIT, STREAMS) + block * 256
        # After two digits few tokens match; members are few from the start.
        write_histogram(target, digit, match, CHUNK, (DIGIT >= 2) | (stream == 2))


@triton.jit
def advance(
    hist, state, above, share, stream, row, block, rows, blocks, used,
    DIGIT: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """Fix the digit before DIGIT; block 0 keeps the state, each block its count above."""
    slot = state + ((stream * rows + row) * 4 + DIGIT - 1) * 2  # DIGITS states of 2 numbers
    if DIGIT == 1:
        prefix, wanted = tl.full([], 0, tl.uint32), share
    else:
        prefix, wanted = tl.load(slot).to(tl.uint32, bitcast=True), tl.load(slot + 1)
    base = histogram_of_stream(hist, stream, row, rows, blocks, DIGIT - 1, STREAMS)
    digit, prefix, remaining = fix_digit(row_histogram(base, used), prefix, wanted, DIGIT - 1)
    bins = tl.arange(0, 256)
    own = tl.sum(tl.where(bins > digit, tl.load(base + block * 256 + bins), 0), 0)
    counter = above + (stream * rows + row) * blocks + block
    if DIGIT > 1:
        own += tl.load(counter)
    tl.store(counter, own)
    if block == 0:
        if DIGIT == 1:
            tl.store(slot + 1, wanted)
        tl.store(slot + 2, prefix.to(tl.int32, bitcast=True))
        tl.store(slot + 3, remaining)
    return prefix


@triton.jit
def rank_tokens(
    hist, state, above, key, match, stream, row, block, rows, blocks, used, STREAMS: tl.constexpr
):  # fmt: skip
    """(taken, number of taken tokens of the row up to and including each) of a block's tokens."""
    slot = state + ((stream * rows + row) * 4 + 3) * 2
    prefix, wanted = tl.load(slot).to(tl.uint32, bitcast=True), tl.load(slot + 1)
    base = histogram_of_stream(hist, stream, row, rows, blocks, 3, STREAMS)
    digit, threshold, ties = fix_digit(row_histogram(base, used), prefix, wanted, 3)
    bins = tl.arange(0, 256)
    earlier = row_histogram(base, block)  # [256], over the blocks before this one
    ties_before = tl.sum(tl.where(bins == digit, earlier, 0), 0)
    higher_before = tl.sum(tl.where(bins > digit, earlier, 0), 0)
    for first in range(0, block, 256):
        index = first + bins
        counter = above + (stream * rows + row) * blocks + index
        higher_before += tl.sum(tl.load(counter, mask=index < block, other=0), 0)
    higher, tie = match & (key > threshold), match & (key == threshold)
    # Both counts in one scan: a block has at most 16,384 tokens, so 16 bits hold each.
    packed = tl.cumsum(higher.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    tie_rank = ties_before + (packed >> 16)
    upto = higher_before + (packed & 0xFFFF) + tl.minimum(tie_rank, ties)
    return higher | (tie & (tie_rank <= ties)), upto


@triton.jit
def fill_rest(tokens, row, block, blocks, count, k_max):
    """Write -1 past the count; the row's programs share the places."""
    for first in range(block * 1024, k_max, blocks * 1024):
        place = first + tl.arange(0, 1024)
        empty = (place >= count) & (place < k_max)
        tl.store(tokens + row.to(tl.int64) * k_max + place, tl.full([1024], -1, tl.int32), mask=empty)
