"""How much memory is free here: on the host, within the container's limits, and on the GPU."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes. gpu is None where there is no GPU to ask."""

    host: int
    gpu: int | None = None


def measure(device: str = "auto") -> FreeMemory:
    """Free memory of this machine; the GPU's only when the device may be one."""
    if device == "cpu" or not torch.cuda.is_available():
        return FreeMemory(host_free_bytes())
    index = torch.device(device).index if device != "auto" else None
    free, total = torch.cuda.mem_get_info(index)
    # PyTorch's allocator keeps freed blocks for itself; they are free for us. It may have a limit of its own.
    reserved, allocated = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
    limit = int(total * torch.cuda.get_per_process_memory_fraction(index))
    return FreeMemory(host_free_bytes(), max(min(free + reserved, limit) - allocated, 0))


def limit_gpu(device: str, gigabytes: float | None) -> None:
    """Make PyTorch refuse to hold more than that many GB (1e9 bytes) of a GPU's memory; None changes nothing.

    measure() counts the limit. It is the process's, not one model's.
    """
    if gigabytes is None or device == "cpu" or not torch.cuda.is_available():
        return
    index = torch.device(device).index if device not in ("auto", "cuda") else torch.cuda.current_device()
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), index)


def host_free_bytes(root: Path = Path("/")) -> int:
    """What this process can still take: the machine's free memory, the container's or its `ulimit -v`'s."""
    free = psutil.virtual_memory().available
    if not sys.platform.startswith("linux"):
        return free
    return max(0, min([free, *(limit - used for limit, used in cgroup_limits(root) + address_limit())]))


def address_limit() -> list[tuple[int, int]]:
    """[(limit, used)] bytes of address space where `ulimit -v` sets a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return [] if limit == resource.RLIM_INFINITY else [(limit, psutil.Process().memory_info().vms)]


def cgroup_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(limit, used) bytes of every memory cgroup above this process that has a limit; v2 and v1.

    Used leaves out inactive page cache, which the kernel gives back before it
    refuses memory. root: where proc and sys are found.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / group.lstrip("/")
        # A container often sees its own group at the mount's top, whatever path /proc names.
        for place in dict.fromkeys([folder, *folder.parents, top]):
            if place == top or top in place.parents:
                found += read_limit(place, *names)
    return found


def read_limit(folder: Path, limit_name: str, used_name: str, cache_name: str) -> list[tuple[int, int]]:
    """[(limit, used)] of one cgroup folder, or [] when it sets no limit."""
    try:
        limit, used = (folder / limit_name).read_text().strip(), int((folder / used_name).read_text())
        stats = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    if limit == "max" or int(limit) >= 1 << 60:  # v1 writes "no limit" as a number near 2^63
        return []
    return [(int(limit), used - int(stats.get(cache_name, 0)))]
