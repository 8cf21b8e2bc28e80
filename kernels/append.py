"""Append the current token's row: to its sink or ring place on the GPU and to host memory."""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED
from .early_launch import early_launch, wait_for_inputs


def append_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    sinks: int,
    recent: int,
    host_rows: torch.Tensor | None,
) -> None:
    """Append the current token's row; shapes as in append_rows_reference."""
    run = append_rows_triton if slots.is_cuda else append_rows_reference
    run(key, value, lengths, slots, sinks, recent, host_rows)


def append_rows_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    sinks: int,
    recent: int,
    host_rows: torch.Tensor | None,
) -> None:
    """Write one row per sequence and KV head at position lengths - 1.

    key and value [B, Hkv, D]; lengths [B] int32, the current token included, 0 for an
    empty place, which appends nothing;
    slots [B, Hkv, sinks + recent + n_slots, 2 D]: places [0, sinks) are the
    sinks and [sinks, sinks + recent) the ring, position p at p % recent;
    host_rows [B, Hkv, N, 2 D], pinned on a CUDA machine; None for a layer that stays on the GPU.
    """
    row = torch.cat([key, value], -1)  # [B, Hkv, 2 D]
    for b, length in enumerate(lengths.tolist()):
        if not length:
            continue
        position = length - 1
        place = position if position < sinks else sinks + position % recent
        slots[b, :, place] = row[b]
        if host_rows is not None:
            host_rows[b, :, position] = row[b]


def append_rows_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    sinks: int,
    recent: int,
    host_rows: torch.Tensor | None,
) -> None:
    """One launch, one warp a row: the same warp writes the GPU place and, over PCIe, the host row."""
    batch, kv_heads, dim = key.shape
    assert key.stride(2) == value.stride(2) == 1
    assert slots[0, 0].is_contiguous()
    to_host = host_rows is not None
    target = slots if host_rows is None else host_rows
    assert target[0, 0].is_contiguous()
    _append_rows_kernel[(batch * kv_heads,)](
        key, value, lengths, slots, target,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        slots.stride(0), slots.stride(1), target.stride(0), target.stride(1),
        KV_HEADS=kv_heads, DIM=dim, DIM_PAD=triton.next_power_of_2(dim), SINKS=sinks, RECENT=recent,
        TO_HOST=to_host, num_warps=1, **early_launch(key), **FUSED,
    )  # fmt: skip


@triton.jit
def _append_rows_kernel(
    key, value, lengths, slots, host_rows,
    key_b, key_h, value_b, value_h, slots_b, slots_h, host_b, host_h,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, TO_HOST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_b = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    i_h = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    position = tl.load(lengths + i_b).to(tl.int64) - 1
    place = tl.where(position < SINKS, position, SINKS + position % RECENT)
    o_d = tl.arange(0, DIM_PAD)
    m_d = o_d < tl.where(position >= 0, DIM, 0)  # an empty place stores nothing
    b_key = tl.load(key + i_b * key_b + i_h * key_h + o_d, mask=m_d)  # [D]
    b_value = tl.load(value + i_b * value_b + i_h * value_h + o_d, mask=m_d)  # [D]
    p_slot = slots + i_b * slots_b + i_h * slots_h + place * (2 * DIM) + o_d
    if TO_HOST:
        p_host = host_rows + i_b * host_b + i_h * host_h + position * (2 * DIM) + o_d
        tl.store(p_host, b_key, mask=m_d)
        tl.store(p_host + DIM, b_value, mask=m_d)
    tl.store(p_slot, b_key, mask=m_d)
    tl.store(p_slot + DIM, b_value, mask=m_d)
