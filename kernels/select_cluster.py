"""Label scoring and exact top-k in one kernel, on GPUs with thread block clusters (sm_90 and newer).

The CUDA source is compiled at first use through CuPy's RawModule (the extras
cuda12 and cuda13), once for each label format: call it once before a CUDA graph
captures it. Where cluster_select_available() is False,
scores.label_scores and topk.select_topk or sticky.sticky_topk do the same work.
"""

import ctypes
import functools
from typing import Any

import numpy as np
import torch

from .cuda_source import compile_source, runs_hopper_source, shared_limit

SOURCES = ("cluster.cuh", "label_mma.cuh", "cluster_topk.cuh", "select_cluster.cu")  # one text, in this order
THREADS = 512  # a CTA; two such CTAs share an SM where 64 registers a thread are enough
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # CUfunction_attribute of cuda.h
STATIC_BYTES = 16 * 1024  # struct Shared, at most (clusters of 8: 15,472 bytes by ptxas)


def cluster_select_available(device: torch.device, capacity: int) -> bool:
    """Whether the cluster kernel can select from `capacity` tokens on this device."""
    if not runs_hopper_source(device):
        return False
    major = torch.cuda.get_device_capability(device)[0]
    largest = 16 if major in (9, 10) else 8  # sm_120 has no clusters of 16
    return dynamic_bytes(capacity, largest, True) + STATIC_BYTES <= shared_limit(device)


def dynamic_bytes(capacity: int, cluster: int, sticky: bool) -> int:
    """Shared memory of a CTA: keys of its share, a bit a token for the choice (and for the last one)."""
    share = -(-capacity // (cluster * 32)) * 32
    return share * 4 + share // 8 * (2 if sticky else 1)


def select_by_labels_cluster(
    query_labels: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    history: torch.Tensor | None = None,
    new_rows: int = 0,
    attended: bool = True,
) -> None:
    """label_scores and then select_topk, or sticky_topk when there is a history.

    query_labels [B, Hq, R] and offsets [B, Hq] float32; codes [B, Hkv, N,
    code_width] and scales [B, Hkv, N, 2]: the label cache; budgets [B, Hkv] and
    lengths [B] int32; tokens [B, Hkv, K] and counts [B, Hkv] int32 are written.
    history [B, Hkv, P] uint8 and attended: as sticky_topk_reference has them. All tensors contiguous.
    Scores are rounded differently from label_scores (a relative 1e-6 or so), so
    tokens of nearly equal score may change places; the same input gives the same bits.
    """
    import cupy

    batch, kv_heads, capacity = codes.shape[:3]
    channels, group = query_labels.shape[2], query_labels.shape[1] // kv_heads
    sticky = history is not None
    past = codes if history is None else history  # never read without one
    sizes = cluster_sizes(batch * kv_heads, capacity, sticky, tokens.device)
    kernel, cluster = compiled(channels, bits, group, sticky, capacity, sizes, tokens.device.index)
    pointers = (query_labels, offsets, codes, scales, budgets, lengths, past, tokens, counts)
    limits = (sinks, recent, new_rows, int(attended))
    numbers = (kv_heads, capacity, past.shape[-1], *limits, tokens.shape[-1])
    stream = torch.cuda.current_stream(tokens.device).cuda_stream
    with cupy.cuda.Device(tokens.device.index), cupy.cuda.ExternalStream(stream):
        kernel(
            (cluster, kv_heads, batch),
            (THREADS,),
            (*(tensor.data_ptr() for tensor in pointers), *(np.int32(number) for number in numbers)),
            shared_mem=dynamic_bytes(capacity, cluster, sticky),
        )


def cluster_sizes(rows: int, capacity: int, sticky: bool, device: torch.device) -> tuple[int, ...]:
    """CTAs a cluster, the better size first: 16 for a few rows, 8 where those fill the GPU, two CTAs an SM.

    A small cluster finds its SMs sooner beside other work: steps of six sequences beside a prefill take 52 ms
    with 8 and 58 with 16, and delay it less; alone they take the same (8B shape, H100).
    """
    filled = 8 * rows >= torch.cuda.get_device_properties(device).multi_processor_count
    two = 2 * (dynamic_bytes(capacity, 8, sticky) + STATIC_BYTES) <= shared_limit(device)
    return (8, 16) if filled and two else (16, 8)


@functools.cache
def compiled(
    channels: int,
    bits: int,
    group: int,
    sticky: bool,
    capacity: int,
    sizes: tuple[int, ...],
    device_index: int,
) -> tuple[Any, int]:
    """(kernel, CTAs a cluster): of the first of `sizes` that the device can place."""
    import cupy

    limit = shared_limit(torch.device("cuda", device_index))
    with cupy.cuda.Device(device_index):
        for cluster in sizes:
            kernel = build(channels, bits, group, sticky, cluster)
            size = dynamic_bytes(capacity, cluster, sticky)
            # CuPy gives every capacity the same function, so the limit must hold for all of them.
            kernel.max_dynamic_shared_size_bytes = limit - kernel.shared_size_bytes
            if cluster > 8:
                cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            if active_clusters(kernel.kernel.ptr, cluster, size) > 0:
                return kernel, cluster
    raise RuntimeError(f"no thread block cluster of {sizes} fits device {device_index} at {capacity} tokens")


def build(channels: int, bits: int, group: int, sticky: bool, cluster: int) -> Any:
    """Compile the CUDA source for one label format."""
    words = max(1, channels * bits // 128)  # 32-bit words a lane holds of one token
    # Two steps of 4 tokens a lane in flight and two more behind them, within 64 registers for
    # the usual labels, so that two CTAs fit an SM; wide labels fill the registers as they are.
    narrow = words <= 2
    defines = {
        "CHANNELS": channels,
        "BITS": bits,
        "GROUP": group,
        "THREADS": THREADS,
        "CLUSTER": cluster,
        "STICKY": int(sticky),
        "STEPS": 2 if words == 1 else 1,
        "PREFETCH": int(narrow),
        "RESIDENT": 2 if narrow and group <= 4 else 1,
    }
    return compile_source(SOURCES, "select_cluster", defines)


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def active_clusters(function: int, cluster: int, shared_bytes: int) -> int:
    """How many clusters of a kernel the current device can run at once; 0 if it can place none."""
    config = LaunchConfig((cluster, 1, 1), (THREADS, 1, 1), shared_bytes)
    count = ctypes.c_int(0)
    status = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveClusters(
        ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config)
    )
    return count.value if status == 0 else 0
