"""Gather missed rows with the bulk copy engine, on GPUs that have one (sm_90 and newer).

A few CTAs, each alone on its SM, keep a ring of rows in flight without holding
loads in an SM's load pipeline, where kernels beside the gather would queue
behind them. The CUDA source is compiled at first use through CuPy's RawModule
(the extras cuda12 and cuda13), once for each row size: call it once before a
CUDA graph captures it.
"""

import ctypes
import functools
from typing import Any

import torch

from .cuda_source import compile_source, runs_hopper_source, shared_limit
from .driver_launch import launch_kernel

THREADS = 64  # as in gather_bulk.cu
STAGE_BYTES = 16 * 1024  # a group: 32 rows of 512 B, one a lane
RING_BYTES = 128 * 1024  # in flight a CTA: 8 CTAs hold 1 MiB, ten times what 50 GB/s x 2 us of latency needs
COUNT_BYTES = 8 * 1024  # 2,048 heads
OTHER_BYTES = COUNT_BYTES + 8 * 1024  # and 1 KiB of list entries, and two barriers a stage (at most 2 KiB)
# CTAs on neighbouring SMs. Those of a cluster lie in one GPC; anywhere, they leave fewer GPCs with room for
# the selections' clusters of 16, and some of these wait: 14.1 ms a step, not 13.1 (gather_placement.json).
CLUSTER = 8


def gather_bulk_available(device: torch.device, row_bytes: int) -> bool:
    """Whether gather_rows_bulk runs on this device for rows of this size."""
    return row_bytes % 64 == 0 and 64 <= row_bytes <= STAGE_BYTES and runs_hopper_source(device)


def gather_rows_bulk(
    host_rows: torch.Tensor,
    miss_tokens: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_counts: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
    num_ctas: int = 8,
    ring_bytes: int = RING_BYTES,
) -> None:
    """gather_rows_reference in one launch of num_ctas CTAs, each with ring_bytes of rows in flight.

    host_rows may be pinned, managed or on the GPU.
    """
    import cupy

    batch, kv_heads, budget = miss_tokens.shape
    row_bytes = slots.shape[-1] * slots.element_size()
    assert cupy.cuda.runtime.pointerGetAttributes(host_rows.data_ptr()).type != 0  # memory that CUDA knows
    for rows in (host_rows, slots):
        assert rows[0, 0].is_contiguous()
        assert rows.shape[-1] * rows.element_size() == row_bytes
        assert rows.data_ptr() % 16 == 0
    for listed in (miss_tokens, miss_slots, miss_counts):
        assert listed.is_contiguous()
        assert listed.dtype == torch.int32
    index = slots.device.index
    assert batch * kv_heads * miss_counts.element_size() <= COUNT_BYTES
    kernel, shared_bytes = compiled(row_bytes, ring_bytes, 1 if num_ctas % CLUSTER else CLUSTER, index)
    pointers = [tensor.data_ptr() for tensor in (host_rows, miss_tokens, miss_slots, miss_counts)]
    pointers.append(slots.data_ptr() + first_slot * row_bytes)
    strides = [rows.stride(i) * rows.element_size() for rows in (host_rows, slots) for i in (0, 1)]
    numbers = (kv_heads, batch * kv_heads, budget)
    passed = (
        *map(ctypes.c_void_p, pointers), *map(ctypes.c_longlong, strides), *map(ctypes.c_int, numbers)
    )  # fmt: skip
    launch_kernel(kernel, (num_ctas, 1, 1), (THREADS, 1, 1), shared_bytes, passed, slots.device)


@functools.cache
def compiled(row_bytes: int, ring_bytes: int, cluster: int, device_index: int) -> tuple[Any, int]:
    """(kernel, dynamic shared memory of a CTA): all that an SM has, so that no other CTA shares the SM."""
    import cupy

    limit = shared_limit(torch.device("cuda", device_index))
    with cupy.cuda.Device(device_index):
        kernel = build(row_bytes, min(ring_bytes, limit - OTHER_BYTES), cluster)
        kernel.max_dynamic_shared_size_bytes = limit
    return kernel, limit


def build(row_bytes: int, ring_bytes: int, cluster: int) -> Any:
    """Compile the CUDA source for one row size."""
    group = min(STAGE_BYTES // row_bytes, 32)
    stages = max(ring_bytes // (group * row_bytes), 2)
    defines = {"ROW_BYTES": row_bytes, "GROUP": group, "STAGES": stages, "CLUSTER": cluster}
    return compile_source(("gather_bulk.cu",), "gather_bulk", defines)
