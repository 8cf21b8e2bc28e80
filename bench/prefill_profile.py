"""Where a prefill's GPU time goes, by groups of kernels, from torch.profiler."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first group with a word that is in the kernel's name. Flash attention's names mention cutlass.
GROUPS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "merge": ("_merge_kernel",),
    "labels": ("_make_labels",),
    "norms": ("_rms_norm",),
    "rows out": ("memcpy dtoh",),
    "rows in": ("memcpy htod",),
    "matmul": ("gemm", "cutlass", "nvjet", "cublas", "xmma"),
    "copies on the GPU": ("memcpy dtod", "copy_kernel", "catarray"),
    "elementwise": ("elementwise", "reduce_kernel", "vectorized"),
}
ON_THE_LINK = ("rows out", "rows in")  # beside the compute stream
LONGEST = 12  # kernels named one by one


def group_of(name: str) -> str:
    lower = name.lower()
    return next((group for group, words in GROUPS.items() if any(w in lower for w in words)), "other")


def breakdown(kernels: Iterable[tuple[str, float]], wall_s: float) -> dict[str, Any]:
    """kernels: (name, seconds) of every launch; seconds a group, and what the compute stream idled."""
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(list)
    for name, seconds in kernels:
        groups[group_of(name)] += seconds
        names[name].append(seconds)
    busy = sum(seconds for group, seconds in groups.items() if group not in ON_THE_LINK)
    longest = sorted(names, key=lambda name: -sum(names[name]))[:LONGEST]
    return {
        "wall_s": wall_s,
        "groups_s": {group: round(s, 4) for group, s in sorted(groups.items(), key=lambda item: -item[1])},
        "idle_s": wall_s - busy,
        "launches": sum(map(len, names.values())),
        "longest": [
            {"kernel": name[:120], "s": round(sum(names[name]), 4), "launches": len(names[name])}
            for name in longest
        ],
    }


def profiled(work: Callable[[], object]) -> dict[str, Any]:
    """The breakdown of one call; on a CPU its operators stand in for kernels."""
    on_gpu = torch.cuda.is_available()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - began
    events = [event for event in recorded.events() if event.device_type == kind]
    return breakdown(((event.name, event.time_range.elapsed_us() / 1e6) for event in events), wall_s)
