"""Pinned host memory: mapped and faulted in by many threads, then registered with CUDA.

The kernel zeroes every page before CUDA may lock it, and that part runs in parallel and
outside the driver. On an H100 host with 16 cores: 0.75 s/GiB for pin_memory=True, 0.28 to 0.46
for shared 4 KiB pages touched one by one, 0.11 to 0.13 for private pages of 2 MiB
populated by one call a piece (bench/results/pinning.json).
"""

import ctypes
import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import EFAULT, ENOMEM

import numpy as np
import torch

PAGE_BYTES = 4096
Spans = tuple[tuple[int, int], ...]  # (first byte, bytes) of the parts of a region that need memory; (): all
PIECE_BYTES = 16 << 20  # one call of one thread: eight pages of 2 MiB, large against a call
MADV_POPULATE_WRITE = 23  # linux/mman.h, since Linux 5.14; Python's mmap does not name it


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor in page-locked memory, unlocked when it is freed.

    Raises MemoryError when the host cannot map or lock that much.
    """
    elements = int(np.prod(shape, dtype=np.int64))
    pages = mapped(max(elements * dtype.itemsize, 1))
    populate(pages)
    register(pages)
    return torch.from_numpy(pages).view(dtype)[:elements].view(shape)


def mapped(size: int) -> np.ndarray:
    """Address space of `size` bytes, without memory behind it yet; MemoryError when there is no room."""
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot map {size / 1e9:.2f} GB of host memory: {error}") from error
    with suppress(OSError, AttributeError):  # a kernel without huge pages, a system without the flag
        region.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(region, dtype=np.uint8)


def populate(pages: np.ndarray, spans: Spans = ()) -> None:
    """Put memory behind every page of the spans, in parallel; one core is left to who launches kernels."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would hold the interpreter's lock
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def fill(piece: tuple[int, int]) -> None:
        start, size = piece
        if madvise(pages.ctypes.data + start, size, MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() in (ENOMEM, EFAULT):
            raise MemoryError(f"no host memory for {pages.nbytes / 1e9:.2f} GB of KV rows")
        pages[start : start + size : PAGE_BYTES] = 0  # an older kernel: a write to every page

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        list(pool.map(fill, pieces(spans or ((0, pages.nbytes),))))


def pieces(spans: Spans) -> list[tuple[int, int]]:
    """(first byte, bytes) of what threads fill one by one, beginning at a page."""
    found = []
    for first, size in spans:
        start, end = first - first % PAGE_BYTES, first + size
        found += [(at, min(PIECE_BYTES, end - at)) for at in range(start, end, PIECE_BYTES)]
    return found


def register(pages: np.ndarray) -> None:
    """Page-lock the memory of an array for as long as the array lives."""
    runtime = torch.cuda.cudart()
    address = pages.ctypes.data
    status = int(runtime.cudaHostRegister(address, pages.nbytes, 0))
    if status:
        raise MemoryError(
            f"CUDA cannot pin {pages.nbytes / 1e9:.2f} GB of host memory (error {status}): "
            "check `ulimit -l` and the container's memory limit"
        )
    # A child process gets none of it: pages that a device may write cannot be shared, so a fork would copy.
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(pages.nbytes), mmap.MADV_DONTFORK)
    weakref.finalize(pages, runtime.cudaHostUnregister, address)
