"""Attention of one query over pieces of a list of rows, which are read where they lie.

A piece's result is its weighted values and their softmax sum; combine_pieces.py makes one output of all. The
order within a piece is the order of the list, and how a list is cut depends on shapes only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .combine_pieces import Pieces
from .compile_options import FUSED
from .early_launch import launch_in_turn, wait_for_inputs

# Which rows of a list (resident ones are known by their slots' stamps, of residency.py): all of sinks,
# selection and ring; of these all but what just entered; or of a list of what may enter, what is selected.
WHOLE, MEMBERS, ENTERED = 0, 1, 2
# Pieces in all, four for each of an H100's 132 SMs; bytes of keys that a program reads at a time; blocks on
# their way; warps. 16,384 rows of 8 heads at 262,144 tokens take 23.2 us by slots and 26.1 by tokens, 2,048
# rows 7.6; with 1056, 8192, 2, 1 they take 26.0, 27.1, 7.5, with 264, 32768, 2, 4 24.0, 27.2 and 8
# (attention_unmasked_h200.json).
PROGRAMS, BLOCK_BYTES, STAGES, WARPS = 528, 16384, 2, 2


class Inputs(NamedTuple):
    """What all pieces of one attention share, as sparse_attention_reference has it.

    slot_of_token None: lists are of slots, in the order of their tokens. A look-up less: 23.2 us for 26.1
    (16,384 rows of 8 heads at 262,144 tokens, H200, bench.ops).
    """

    query: torch.Tensor
    slots: torch.Tensor
    slot_of_token: torch.Tensor | None
    lengths: torch.Tensor
    sinks: int
    recent: int
    scale: float
    softcap: float


def block_rows(slots: torch.Tensor, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows of slots [..., 2 D] that a program reads at a time: block_bytes of keys and as much of values."""
    key_bytes = triton.next_power_of_2(slots.shape[-1] // 2) * slots.element_size()
    return min(max(block_bytes // key_bytes, 16), 128)


def cut(rows: int, lists: int, block: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(rows of a piece, pieces of a list) for `lists` lists of up to `rows` and about `programs` programs."""
    blocks = triton.cdiv(rows, block)
    chunk = triton.cdiv(blocks, max(programs // lists, 1)) * block
    return chunk, triton.cdiv(blocks * block, chunk)


def attend_pieces(
    inputs: Inputs,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    pieces: Pieces,
    first_split: int,
    splits: int,
    chunk: int,
    block: int,
    part: int = WHOLE,
    stamps: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    phase: int = 0,
    num_stages: int = STAGES,
    num_warps: int = WARPS,
) -> None:
    """Write the results of `splits` pieces of lists, a program each, from first_split on.

    tokens [B, Hkv, K] ascending (or their slots) and counts [B, Hkv] int32: the selection, or what may
    enter. chunk: rows of a piece, whole blocks; of ENTERED a block, and pieces take blocks in turn.
    stamps [B, Hkv, n_slots, 2], step [1] and phase as resolve_reference has them, for the parts.
    """
    query, slots, slot_of_token, lengths, sinks, recent, scale, softcap = inputs
    batch, heads, dim = query.shape
    kv_heads, budget = tokens.shape[1:]
    assert query.stride(2) == 1
    assert slot_of_token is None or slot_of_token.stride(2) == 1
    assert slots[0, 0].is_contiguous()
    assert tokens.is_contiguous()
    assert part == WHOLE or (stamps is not None and stamps.is_contiguous())
    group = heads // kv_heads
    # In turn: places taken early would be those of the next layer's gather, which may start now (22 us later
    # then, of 1,100; budget 1/16, exact, H200).
    _attend_kernel[(splits, batch * kv_heads)](
        query, slots, tokens, counts, slot_of_token, lengths, *pieces, stamps, step, phase,
        query.stride(0), query.stride(1), slots.stride(0), slots.stride(1),
        *((0, 0) if slot_of_token is None else slot_of_token.stride()[:2]),
        0 if stamps is None else stamps.stride(1),
        budget, first_split, scale, softcap,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=max(16, triton.next_power_of_2(group)), DIM=dim,
        DIM_PAD=triton.next_power_of_2(dim), SINKS=sinks, RECENT=recent, SPLITS=pieces.splits, CHUNK=chunk,
        BLOCK=block, PART=part, SOFTCAP=softcap != 0.0, UPCAST=not query.is_cuda, STAGES=num_stages,
        num_warps=num_warps, **launch_in_turn(query), **FUSED,
    )  # fmt: skip


@triton.jit
def _attend_kernel(
    query, slots, tokens, counts, slot_of_token, lengths, partial, tops, sums, stamps, step, phase,
    query_b, query_h, slots_b, slots_h, map_b, map_h, stamps_h, budget, first_split, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One piece of one KV head's list. PART, as the constants above: which rows, by their slots' stamps."""
    LOG2E: tl.constexpr = 1.4426950408889634
    wait_for_inputs(EARLY)
    i_split = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // KV_HEADS).to(tl.int64)
    i_h = (i_bh % KV_HEADS).to(tl.int64)
    length = tl.load(lengths + i_b)
    count = tl.load(counts + i_bh)
    # The row list: n_sinks sinks, then count selected rows, then the ring from ring_start on.
    n_sinks = tl.minimum(SINKS, length) if PART != 2 else 0
    ring_start = tl.maximum(SINKS, length - RECENT)
    total = n_sinks + count + (tl.maximum(length - ring_start, 0) if PART != 2 else 0)
    total = tl.where(length > 0, total, 0)  # an empty place has no newest row either
    start = i_split * CHUNK
    # What may enter is few at most steps: its blocks are dealt out, so that every program has some.
    last = tl.minimum(start + CHUNK, total) if PART != 2 else total
    stride = BLOCK if PART != 2 else tl.num_programs(0) * BLOCK
    now = tl.load(step) if PART != 0 else 0
    p_stamps = stamps + i_bh.to(tl.int64) * stamps_h if PART != 0 else 0

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
    p_map = None if slot_of_token is None else slot_of_token + i_b * map_b + i_h * map_h
    newest = tl.where(length > SINKS, SINKS + (length - 1) % RECENT, 0)  # where the current token's row lies
    unit = scale * LOG2E  # of logits in powers of 2

    # A part's block may have no row at all, and minus infinity less itself is no number.
    b_top = tl.full([GROUP_PAD], float("-inf") if PART == 0 else -1e30, tl.float32)
    b_sum = tl.zeros([GROUP_PAD], tl.float32)
    b_out = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for first in tl.range(start, last, stride, num_stages=STAGES):
        b_place, m_n = _places(
            first, last, n_sinks, count, ring_start, p_tokens, p_map, p_stamps, now, phase, newest,
            SINKS, RECENT, BLOCK, PART,
        )  # fmt: skip
        p_key = p_rows + b_place[:, None] * (2 * DIM) + o_d[None, :]
        b_key = tl.load(p_key, mask=m_d[None, :], other=0.0)  # [BLOCK, D]
        b_value = tl.load(p_key + DIM, mask=m_d[None, :], other=0.0)  # [BLOCK, D]
        if UPCAST:
            b_key = b_key.to(tl.float32)
            b_value = b_value.to(tl.float32)
        b_logit = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * unit  # [G, BLOCK]
        if SOFTCAP:
            b_logit = softcap * LOG2E * (1 - 2 / (tl.exp2(b_logit * (2 / softcap)) + 1))
        b_top, b_sum, b_out = _take_in(b_logit, b_value, m_n, b_top, b_sum, b_out, PART)

    # A piece past the end leaves top = -inf; its sums and values are then never read.
    o_part = (i_bh * GROUP + o_g).to(tl.int64) * SPLITS + first_split + i_split
    if PART != 0:
        b_top = tl.where(start < total, b_top, float("-inf"))
    tl.store(tops + o_part, b_top, mask=m_g)
    if start < total:
        tl.store(sums + o_part, b_sum, mask=m_g)
        p_partial = partial + o_part[:, None] * DIM + o_d[None, :]
        tl.store(p_partial, b_out, mask=m_g[:, None] & m_d[None, :])


@triton.jit
def _places(
    first, last, n_sinks, count, ring_start, p_tokens, p_map, p_stamps, now, phase, newest,
    SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Where a block of the list's rows lie, counted from the first sink, and which of them take part.

    For the others, whose rows may be on their way, the newest token's row: without masks by row, the loop has
    441 instructions instead of 609 (sm_90).
    """
    o_n = first + tl.arange(0, BLOCK)
    m_n = o_n < last
    o_k = o_n - n_sinks
    m_k = m_n & (o_k >= 0) & (o_k < count)
    b_slot = tl.load(p_tokens + o_k, mask=m_k, other=0)  # [BLOCK]
    if p_map is not None:
        b_slot = tl.load(p_map + b_slot, mask=m_k, other=0)
    if PART == 1:
        m_n = m_n & (~m_k | (tl.load(p_stamps + 2 * b_slot + 1, mask=m_k, other=0) != 2 * now + phase))
    elif PART == 2:
        m_n = m_n & (tl.load(p_stamps + 2 * b_slot, mask=m_k, other=0) == now)
    b_ring = SINKS + (ring_start + o_k - count) % RECENT
    b_place = tl.where(m_k, SINKS + RECENT + b_slot, tl.where(o_k < 0, o_n, b_ring))
    return tl.where(m_n, b_place, newest).to(tl.int64), m_n


@triton.jit
def _take_in(b_logit, b_value, m_n, b_top, b_sum, b_out, PART: tl.constexpr):
    """Running softmax: logits [G, BLOCK] in powers of 2 and values [BLOCK, D] of the rows that take part."""
    b_logit = tl.where(m_n[None, :], b_logit, float("-inf") if PART == 0 else -1e30)
    b_new_top = tl.maximum(b_top, tl.max(b_logit, 1))
    b_shrink = tl.exp2(b_top - b_new_top)
    b_mass = tl.exp2(b_logit - b_new_top[:, None])
    if PART != 0:
        b_mass = tl.where(m_n[None, :], b_mass, 0.0)
    b_sum = b_sum * b_shrink + tl.sum(b_mass, 1)
    b_out = b_out * b_shrink[:, None]
    b_out = tl.dot(b_mass.to(b_value.dtype), b_value, b_out, input_precision="ieee")
    return b_new_top, b_sum, b_out
