"""Tensors in files with checksums, and a directory that appears whole or not at all.

The checksum is CRC-32 of the whole file. It catches damage, truncation and files
swapped between snapshots; it does not catch a change made on purpose.
"""

import fcntl
import glob
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

BLOCK_BYTES = 16 << 20  # read or written, then summed; small against a layer, large against a system call


class DamagedFile(Exception):
    """A file that is not what was written. The message says how."""


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    return memoryview(tensor.detach().flatten().view(torch.uint8).numpy().data)


def blocks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), BLOCK_BYTES):
        yield view[start : start + BLOCK_BYTES]


def write_tensors(path: Path, tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Write contiguous tensors one after the other, to the disk itself; returns bytes and crc32."""
    size = checksum = 0
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors:
            for block in blocks(byte_view(tensor.cpu())):
                checksum = zlib.crc32(block, checksum)
                size += len(block)
                while block:
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": checksum}


def sync_file(path: Path) -> dict[str, int]:
    """Bring a small file that someone else wrote to the disk itself; returns bytes and crc32."""
    with open(path, "rb") as file:
        data = file.read()
        os.fsync(file.fileno())
    return {"bytes": len(data), "crc32": zlib.crc32(data)}


def read_tensors(path: Path, tensors: Iterable[torch.Tensor], record: dict[str, int]) -> None:
    """Fill contiguous tensors from a file, CPU ones in place; DamagedFile when it differs from its record."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors:
            # A CUDA tensor is filled through one of its size on the host.
            target = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
            for block in blocks(byte_view(target)):
                fill(file, block)
                checksum = zlib.crc32(block, checksum)
            if target is not tensor:
                tensor.copy_(target)
        if file.read(1):
            raise DamagedFile(f"{path.name} is longer than it was written")
    if checksum != record["crc32"]:
        raise DamagedFile(f"{path.name} is damaged: its checksum is wrong")


def fill(file: Any, block: memoryview) -> None:
    while block:
        count = file.readinto(block)
        if not count:
            raise DamagedFile(f"{Path(file.name).name} is shorter than it was written")
        block = block[count:]


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """An empty directory to fill; it takes target's place when the block ends well, else it goes away.

    What a killed write left beside the target is removed here: its lock, which
    the kernel drops with the process, tells it from a write that is still going on.
    """
    restore_replaced(target)
    remove_leftovers(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.partial")
    part.mkdir()
    lock = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield part
        sync_directory(part)
        replace_directory(part, target)
    finally:
        os.close(lock)
        shutil.rmtree(part, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with suppress(OSError):  # locked: someone is writing it
            lock = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part)
            finally:
                os.close(lock)


def replaced_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def replace_directory(part: Path, target: Path) -> None:
    """Two renames; restore_replaced() mends a death between them."""
    old = replaced_name(target)
    if target.exists():
        target.rename(old)
    part.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(target: Path) -> None:
    """Finish or undo a replacement that was cut short."""
    old = replaced_name(target)
    if not old.exists():
        return
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
