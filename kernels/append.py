"""Append the current token's row: to its sink or ring place on the GPU and to host memory."""

import torch
import triton
import triton.language as tl


def append_rows_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    sinks: int,
    recent: int,
    host_rows: torch.Tensor,
) -> None:
    """Write one row per sequence and KV head at position lengths - 1.

    key and value [B, Hkv, D]; lengths [B] int32, the current token included;
    slots [B, Hkv, sinks + recent + n_slots, 2 D]: places [0, sinks) are the
    sinks and [sinks, sinks + recent) the ring, position p at p % recent;
    host_rows [B, Hkv, N, 2 D], pinned on a CUDA machine.
    """
    row = torch.cat([key, value], -1)  # [B, Hkv, 2 D]
    for b, length in enumerate(lengths.tolist()):
        position = length - 1
        place = position if position < sinks else sinks + position % recent
        slots[b, :, place] = row[b]
        host_rows[b, :, position] = row[b]
