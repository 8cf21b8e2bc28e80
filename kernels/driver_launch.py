"""How kernels of CUDA C++ are launched: by the driver's own call, on PyTorch's current stream.

CuPy compiles them (cuda_source.py), but its launch can neither ask for an early start nor take a stream that
is not its own, other than by a class it is about to drop (ExternalStream).
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID of cuda.h


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h; value: a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int * 16))


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


def launch_kernel(
    function: Any,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    arguments: Sequence[Any],
    device: torch.device,
    early: bool = False,
) -> None:
    """Launch a kernel of CuPy's with ctypes numbers and pointers; early: before the one ahead has ended.

    A kernel that is launched early must wait for its inputs itself (early_launch.py). RuntimeError: the
    driver refuses the launch.
    """
    attribute = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
    stream = torch.cuda.current_stream(device).cuda_stream
    config = LaunchConfig(grid, block, shared_bytes, stream, ctypes.addressof(attribute), int(early))
    places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    with torch.cuda.device(device):  # of which CuPy gives the CUfunction
        handle = ctypes.c_void_p(function.kernel.ptr)
        status = driver().cuLaunchKernelEx(ctypes.byref(config), handle, places, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: error {status} (CUresult of cuda.h)")


@functools.cache
def driver() -> ctypes.CDLL:
    """Opened once: steps without a graph launch through it some hundred times."""
    return ctypes.CDLL("libcuda.so.1")
