"""How kernels that run in thread block clusters are compiled, placed and launched (sm_90 and newer).

The CUDA sources are compiled at first use through CuPy's RawModule (the extras cuda12 and cuda13), once for
each set of settings: call a kernel once before a CUDA graph captures it.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .cuda_source import compile_source, shared_limit
from .driver_launch import LaunchConfig, driver, launch_kernel

THREADS = 512  # a CTA, of kernels that do not score
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # CUfunction_attribute of cuda.h
STATIC_BYTES = 18 * 1024  # static shared memory of the kernels that score, at most (admit: 18,352 by ptxas)
LIST_SOURCES = ("cluster.cuh", "order_key.cuh", "resolve_list.cuh")
CHOOSING_SOURCES = ("cluster.cuh", "order_key.cuh", "cluster_topk.cuh", "resolve_list.cuh")
SCORING_SOURCES = ("cluster.cuh", "order_key.cuh", "label_mma.cuh", "cluster_topk.cuh", "score_tokens.cuh")
ADMITTING_SOURCES = (*SCORING_SOURCES, "member_bits.cuh", "resolve_list.cuh")


def label_defines(channels: int, bits: int, group: int) -> tuple[tuple[str, int], ...]:
    """What a kernel that scores labels of one format is compiled for."""
    words = max(1, channels * bits // 128)  # 32-bit words a lane holds of one token
    # Two steps of 4 tokens a lane in flight, within 64 registers for the usual labels, so that an SM
    # holds 1,024 threads; wide labels fill the registers as they are.
    narrow = words <= 2
    return (
        ("CHANNELS", channels),
        ("BITS", bits),
        ("GROUP", group),
        ("STEPS", 2 if words == 1 else 1),
        ("RESIDENT_THREADS", 1024 if narrow and group <= 4 else 512),
    )


class Cluster(NamedTuple):
    """CTAs of a cluster, threads and dynamic shared memory of each."""

    ctas: int
    threads: int
    shared_bytes: int


@functools.cache
def compiled(
    name: str,
    sources: tuple[str, ...],
    defines: tuple[tuple[str, int], ...],
    sizes: tuple[Cluster, ...],
    device_index: int,
) -> tuple[Any, Cluster]:
    """Kernel `name` for the first of `sizes` that can be placed, and that."""
    import cupy

    limit = shared_limit(torch.device("cuda", device_index))
    with cupy.cuda.Device(device_index):
        for size in sizes:
            settings = {**dict(defines), "THREADS": size.threads, "CLUSTER": size.ctas}
            kernel = compile_source((*sources, f"{name}.cu"), name, settings)
            # CuPy gives every capacity the same function, so the limit must hold for all of them.
            kernel.max_dynamic_shared_size_bytes = limit - kernel.shared_size_bytes
            if size.ctas > 8:
                cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
            if active_clusters(kernel.kernel.ptr, size) > 0:
                return kernel, size
    raise RuntimeError(f"device {device_index} can place no thread block cluster of {sizes} for {name}")


def launch(
    kernel: tuple[Any, Cluster], rows: Sequence[int], tensors: Sequence[torch.Tensor], numbers: Sequence[int]
) -> None:
    """Launch what compiled() gave, a cluster for each (sequence, KV head); rows: (batch, KV heads).

    Tensors, all contiguous, go as pointers and numbers as 32-bit integers. It starts early (early_launch.py):
    behind admit, choose must find room before the next prediction's products have taken it, 15 us later
    otherwise (262,144 tokens, 1/16, 2,048 new rows, `correct`, H200).
    """
    function, cluster = kernel
    assert all(tensor.is_contiguous() for tensor in tensors)
    passed = (*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_int, numbers))
    grid, block = (cluster.ctas, rows[1], rows[0]), (cluster.threads, 1, 1)
    launch_kernel(function, grid, block, cluster.shared_bytes, passed, tensors[0].device, early=True)


def active_clusters(function: int, cluster: Cluster) -> int:
    """How many clusters of a kernel the current device can run at once; 0 if it can place none."""
    config = LaunchConfig((cluster.ctas, 1, 1), (cluster.threads, 1, 1), cluster.shared_bytes)
    count = ctypes.c_int(0)
    status = driver().cuOccupancyMaxActiveClusters(
        ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config)
    )
    return count.value if status == 0 else 0
