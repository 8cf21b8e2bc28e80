"""Gather missed rows from pinned host memory straight into their slots (zero copy).

A row is K and V of one token and KV head side by side, 64-byte aligned.
"""

import torch
import triton
import triton.language as tl


def gather_rows_reference(
    host_rows: torch.Tensor,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
) -> None:
    """Copy host_rows[b, h, miss_tokens] to slots[b, h, first_slot + miss_slots].

    host_rows [B, Hkv, N, 2 D], pinned on a CUDA machine; miss_tokens and
    miss_slots [B, Hkv, K] int32; miss_counts [B, Hkv] int32; slots
    [B, Hkv, first_slot + n_slots, 2 D].
    """
    for b in range(slots.shape[0]):
        for h in range(slots.shape[1]):
            count = int(miss_counts[b, h])
            source = miss_tokens[b, h, :count].long()
            target = miss_slots[b, h, :count].long() + first_slot
            slots[b, h, target] = host_rows[b, h, source]
