"""Resolve with a thread block cluster for each (sequence, KV head), on sm_90 and newer.

The Triton version has one CTA for each, which waits for memory most of the time: 58 us for 16,384 tokens a
head on an H100. The CUDA source is compiled at first use through CuPy's
RawModule: call it once before a CUDA graph captures it.
"""

import functools
from typing import Any

import numpy as np
import torch

from .cuda_source import compile_source

THREADS = 512  # as in resolve_cluster.cu
CLUSTER = 8  # CTAs; the most that every GPU with clusters can place


def resolve_in_clusters(
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    token_in_slot: torch.Tensor,
    stamps: torch.Tensor,
    hand: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    attended: bool,
    kept_steps: int,
    part: int,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """residency.resolve_reference with the same bits; all tensors contiguous."""
    import cupy

    batch, kv_heads, k_max = tokens.shape
    device = tokens.device
    tensors = (
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step,
        miss_tokens, miss_slots, miss_counts, counters,
    )  # fmt: skip
    assert all(tensor.is_contiguous() for tensor in tensors)
    numbers = (
        kv_heads, k_max, slot_of_token.shape[-1], token_in_slot.shape[-1], int(attended), kept_steps, part
    )  # fmt: skip
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream):
        compiled(phase, device.index)(
            (CLUSTER, kv_heads, batch),
            (THREADS,),
            (*(tensor.data_ptr() for tensor in tensors), *(np.int32(number) for number in numbers)),
        )


@functools.cache
def compiled(phase: int, device_index: int) -> Any:
    import cupy

    with cupy.cuda.Device(device_index):
        defines = {"CLUSTER": CLUSTER, "PHASE": phase}
        return compile_source(("cluster.cuh", "resolve_cluster.cu"), "resolve_cluster", defines)
