"""Host memory that CUDA manages, for rows: the GPU maps it in pages of 2 MiB.

Registered memory is mapped in pages of 64 KiB. A gather of random rows asks for a new one with nearly
every row, and once those in use cover more than some 16 GiB their translations no longer stay in the GPU's
caches: 16,384 rows of 512 B, 30 regions of 1 GiB in turn, take 231 us each, from managed memory 179, which is
the link's time (H100, driver 580; NOTES.md, 2026-11-25). The pages stay in host memory: that is
their preferred location, and the GPU reads and writes them there.
"""

import ctypes
import logging
import weakref
from typing import Any

import numpy as np
import torch

from .cuda_driver import driver_bindings, enter_context, result
from .pinned import Spans, populate

log = logging.getLogger(__name__)


def managed_pages(size: int, device: torch.device, spans: Spans = ()) -> np.ndarray | None:
    """[size] uint8 with memory behind the spans, mapped by the GPU; None where it cannot be had.

    Needs cuda.bindings and a GPU that shares managed memory with the host while both use it
    (Linux). MemoryError when the host has no room.
    """
    if not managed_available(device):
        log.info("no managed memory here: rows go to registered memory")
        return None
    pages = allocate(driver_bindings(), size, device)
    populate(pages, spans)
    return pages


def managed_available(device: torch.device) -> bool:
    """Whether managed_pages gives memory for this device, and so for parts of a region alone."""
    driver = driver_bindings() if device.type == "cuda" else None
    if driver is None:
        return False
    enter_context(driver, device)
    shared = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS
    return bool(result(driver.cuDeviceGetAttribute(shared, device.index or 0)))


def allocate(driver: Any, size: int, device: torch.device) -> np.ndarray:
    """Managed memory [size] that prefers the host and that the GPU maps; freed with the array."""
    try:
        pointer = result(driver.cuMemAllocManaged(size, driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL.value))
    except RuntimeError as error:
        raise MemoryError(f"CUDA cannot manage {size / 1e9:.2f} GB of host memory: {error}") from error
    pages: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pointer)))

    def free() -> None:
        enter_context(driver, device)
        driver.cuMemFree(pointer)

    weakref.finalize(pages, free)
    kinds, advice = driver.CUmemLocationType, driver.CUmem_advise
    host, gpu = kinds.CU_MEM_LOCATION_TYPE_HOST, kinds.CU_MEM_LOCATION_TYPE_DEVICE
    advise(driver, pointer, size, advice.CU_MEM_ADVISE_SET_PREFERRED_LOCATION, host, 0)
    advise(driver, pointer, size, advice.CU_MEM_ADVISE_SET_ACCESSED_BY, gpu, device.index or 0)
    return pages


def advise(driver: Any, pointer: Any, size: int, what: Any, kind: Any, number: int) -> None:
    location = driver.CUmemLocation()
    location.type, location.id = kind, number
    call = getattr(driver, "cuMemAdvise_v2", None) or driver.cuMemAdvise  # its names in CUDA 12 and 13
    result(call(pointer, size, what, location))


class Alias:
    """Memory of a tensor as CUDA's array interface describes it; keeps the tensor."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        size, pointer = rows.nbytes, rows.data_ptr()
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3,
        }  # fmt: skip


def gpu_alias(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same memory as a tensor of the GPU, for managed rows; other rows as they are.

    PyTorch copies between a GPU and a CPU tensor that is not registered through a buffer: 7 GB/s to the
    GPU and 12 back, and the host waits; with this one 50 and 52 (H100).
    """
    if device.type == "cpu" or rows.is_cuda or rows.is_pinned():
        return rows
    return torch.as_tensor(Alias(rows), device=device).view(rows.dtype).view(rows.shape)
