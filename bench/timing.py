"""Time GPU work, and measure the ceilings it is compared with.

`graph_ms` times calls inside a CUDA graph that holds one call for each of
several buffer sets ("layers"), so that, as in decoding, no call finds its data
in L2 and none waits for Python. `step_ms` times whole decode steps.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from offload_runtime.kernels.attention_trial import event_ms

GIB = 1 << 30


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median milliseconds a call of `calls`, captured one after the other and replayed together."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which a capture must not do
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median(_repeated_ms(graph.replay, replays)) / len(calls)


def step_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: between two events of the current stream, or by the clock on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    return event_ms(work)


def _repeated_ms(work: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each repeat after three to warm up."""
    times = [event_ms(work) for _ in range(repeats + 3)]
    return times[3:]


def hbm_copy_gb_s() -> float:
    """Bytes read plus bytes written a second by a device-to-device copy of 1 GiB."""
    source = torch.zeros(GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * GIB / median(_repeated_ms(lambda: target.copy_(source), 10)) / 1e6


def hbm_read_gb_s() -> float:
    """Bytes read a second by a sum over 1 GiB, which is what weights, labels and rows are: read once."""
    source = torch.zeros(GIB // 4, dtype=torch.float32, device="cuda")
    return GIB / median(_repeated_ms(source.sum, 10)) / 1e6


def pinned_copy_gb_s() -> float:
    """Bytes a second of a copy of 256 MiB from pinned host memory by the copy engine."""
    source = torch.empty(GIB // 4, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return GIB / 4 / median(_repeated_ms(lambda: target.copy_(source, non_blocking=True), 10)) / 1e6
