"""Gather missed rows from pinned host memory straight into their slots (zero copy).

A row is K and V of one token and KV head side by side, 64-byte aligned.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .gather_bulk import gather_bulk_available, gather_rows_bulk


def gather_rows(
    host_rows: torch.Tensor,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
) -> None:
    """Fetch the missed rows; shapes as in gather_rows_reference."""
    arguments = (host_rows, miss_tokens, miss_slots, miss_counts, slots, first_slot)
    if not slots.is_cuda:
        gather_rows_reference(*arguments)
    elif host_rows.is_cuda:
        # There is no link to fill: 128 programs x 8 KiB = 1 MiB in flight, near the 1.6 MB that
        # 2.7 TB/s x 0.6 us of latency would need (arithmetic, not measured).
        gather_rows_triton(*arguments, num_programs=128)
    elif gather_bulk_available(slots.device, slots.shape[-1] * slots.element_size()):
        gather_rows_bulk(*arguments)
    else:
        gather_rows_triton(*arguments)


def gather_rows_reference(
    host_rows: torch.Tensor,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
) -> None:
    """Copy host_rows[b, h, miss_tokens] to slots[b, h, first_slot + miss_slots].

    host_rows [B, Hkv, N, 2 D], pinned or in GPU memory on a CUDA machine; miss_tokens and
    miss_slots [B, Hkv, K] int32; miss_counts [B, Hkv] int32; slots
    [B, Hkv, first_slot + n_slots, 2 D].
    """
    for b in range(slots.shape[0]):
        for h in range(slots.shape[1]):
            count = int(miss_counts[b, h])
            source = miss_tokens[b, h, :count].long()
            target = miss_slots[b, h, :count].long() + first_slot
            slots[b, h, target] = host_rows[b, h, source.to(host_rows.device)].to(slots.device)


def gather_rows_triton(
    host_rows: torch.Tensor,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
    num_programs: int = 32,
    block_bytes: int = 8192,
    num_warps: int = 4,
) -> None:
    """Where gather_bulk cannot run: num_programs programs, each with block_bytes of rows in flight.

    32 programs of 4 warps reach the limit of a PCIe 5 x16 link, 16 do not and
    more only take SMs from the model (measured, H100). 32 x 8 KiB = 256 KiB in
    flight, more than twice what 50 GB/s x 2 us of latency needs. Consecutive programs
    take consecutive blocks of a head, so host memory is walked forwards.
    """
    batch, kv_heads, budget = miss_tokens.shape
    row = slots.shape[-1]
    assert slots[0, 0].is_contiguous()
    assert host_rows[0, 0].is_contiguous()
    assert miss_tokens.is_contiguous()
    assert miss_slots.is_contiguous()
    assert miss_counts.is_contiguous()
    row_pad = triton.next_power_of_2(row)
    block = max(block_bytes // (row_pad * slots.element_size()), 1)
    _gather_rows_kernel[(num_programs,)](
        host_rows, miss_tokens, miss_slots, miss_counts, slots,
        host_rows.stride(0), host_rows.stride(1), slots.stride(0), slots.stride(1), budget,
        KV_HEADS=kv_heads, HEADS=batch * kv_heads, HEADS_PAD=triton.next_power_of_2(batch * kv_heads),
        ROW=row, ROW_PAD=row_pad, BLOCK=block, FIRST_SLOT=first_slot, PROGRAMS=num_programs,
        num_warps=num_warps, **FUSED,
    )  # fmt: skip


@triton.jit
def _gather_rows_kernel(
    host_rows, miss_tokens, miss_slots, miss_counts, slots,
    host_b, host_h, slots_b, slots_h, budget,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    ROW: tl.constexpr, ROW_PAD: tl.constexpr, BLOCK: tl.constexpr,
    FIRST_SLOT: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    o_head = tl.arange(0, HEADS_PAD)
    b_count = tl.load(miss_counts + o_head, mask=o_head < HEADS, other=0)  # [B * Hkv]
    b_blocks = (b_count + BLOCK - 1) // BLOCK
    b_end = tl.cumsum(b_blocks, 0)  # blocks of all heads up to and including this one
    total = tl.sum(b_blocks, 0)
    o_row = tl.arange(0, BLOCK)
    o_col = tl.arange(0, ROW_PAD)
    for block in range(tl.program_id(0), total, PROGRAMS):
        head = tl.sum((b_end <= block).to(tl.int32), 0)
        first_block = tl.sum(tl.where(o_head < head, b_blocks, 0), 0)
        count = tl.sum(tl.where(o_head == head, b_count, 0), 0)
        o_miss = (block - first_block) * BLOCK + o_row
        m_miss = o_miss < count
        p_miss = head.to(tl.int64) * budget + o_miss
        b_token = tl.load(miss_tokens + p_miss, mask=m_miss, other=0).to(tl.int64)  # [BLOCK]
        b_slot = tl.load(miss_slots + p_miss, mask=m_miss, other=0).to(tl.int64) + FIRST_SLOT
        i_b = (head // KV_HEADS).to(tl.int64)
        i_h = (head % KV_HEADS).to(tl.int64)
        mask = m_miss[:, None] & (o_col < ROW)[None, :]
        p_host = host_rows + i_b * host_b + i_h * host_h + b_token[:, None] * ROW + o_col[None, :]
        b_rows = tl.load(p_host, mask=mask)  # [BLOCK, 2 D]
        p_slot = slots + i_b * slots_b + i_h * slots_h + b_slot[:, None] * ROW + o_col[None, :]
        tl.store(p_slot, b_rows, mask=mask)
