"""How the pages behind pinned memory decide the gather rate, and what a gather does to kernels beside it.

    python -m bench.host_pages --out bench/results/host_pages.json

A gather of 2,048 ascending rows of 512 B from each of 8 heads cycles through
`regions` layers of 1 GiB, as decode does, for each way to allocate them. `beside`
is the time of a resolve kernel while gathers run, `alone` without them.
"""

import argparse
import json
import mmap
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.machine import machine
from offload_runtime.cache.pinned import register, touch
from offload_runtime.kernels.gather import gather_rows_triton
from offload_runtime.kernels.residency import resolve

HEADS, TOKENS, ROW, ROWS = 8, 262144, 256, 2048  # Llama-3.1-8B shape: 1 GiB a layer, 512 B rows
REGION_BYTES = HEADS * TOKENS * ROW * 2


def mapped(flags: int, huge: bool) -> torch.Tensor:
    region = mmap.mmap(-1, REGION_BYTES, flags=flags)
    if huge:
        region.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(region, dtype=np.uint8)
    touch(pages)
    register(pages)
    return torch.from_numpy(pages).view(torch.bfloat16).view(1, HEADS, TOKENS, ROW)


WAYS: dict[str, Callable[[], torch.Tensor]] = {
    "shared 4 KiB": lambda: mapped(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, False),
    "private huge": lambda: mapped(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, True),
    "cudaHostAlloc": lambda: torch.empty(1, HEADS, TOKENS, ROW, dtype=torch.bfloat16, pin_memory=True),
}


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


class Resolve:
    """A resolve of 2,048 tokens a head, half of them missing."""

    def __init__(self) -> None:
        self.map, self.slots, self.stamps = integers(1, HEADS, TOKENS), integers(1, HEADS, 4096), integers(1, HEADS, 4096)
        self.map.fill_(-1)
        self.slots.fill_(-1)
        self.hand, self.step, self.counts = integers(1, HEADS), integers(1), integers(1)
        self.counts.fill_(ROWS)
        self.misses = (integers(1, HEADS, ROWS), integers(1, HEADS, ROWS), integers(1, HEADS))
        self.counters = torch.zeros(2, 3, dtype=torch.int64, device="cuda")

    def run(self, tokens: torch.Tensor) -> None:
        self.step += 1
        resolve(
            tokens, self.counts, self.map, self.slots, self.stamps, self.hand, self.step, 1,
            *self.misses, self.counters,
        )  # fmt: skip


def draw_tokens() -> torch.Tensor:
    chosen = [torch.randperm(TOKENS, device="cuda")[:ROWS].sort().values for _ in range(HEADS)]
    return torch.stack(chosen).int()[None]  # [1, Hkv, K]


def timed_us(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def measure(way: str, regions: int) -> dict[str, object]:
    host = [WAYS[way]() for _ in range(regions)]
    slots = torch.empty(1, HEADS, ROWS, ROW, dtype=torch.bfloat16, device="cuda")
    target = torch.arange(ROWS, dtype=torch.int32, device="cuda").expand(1, HEADS, ROWS).contiguous()
    counts = integers(1, HEADS) + ROWS
    draws = [draw_tokens() for _ in range(regions)]

    def gather_all() -> None:
        for rows, tokens in zip(host, draws, strict=True):
            gather_rows_triton(rows, tokens, target, counts, slots, 0)

    gather_all()
    cold = [timed_us(gather_all) / regions for _ in range(5)]
    warm = [timed_us(lambda: [gather_rows_triton(host[0], draws[0], target, counts, slots, 0) for _ in range(20)] and None) / 20 for _ in range(3)]
    state, stream = Resolve(), torch.cuda.Stream()
    state.run(draws[0])
    alone = [timed_us(lambda i=i: state.run(draws[i % regions])) for i in range(12)]
    beside = []
    for i in range(12):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            gather_all()
        beside.append(timed_us(lambda i=i: state.run(draws[i % regions])))
    moved = HEADS * ROWS * ROW * 2
    del host
    return {
        "way": way,
        "gather_us": round(statistics.median(cold), 1),
        "gather_gb_s": round(moved / statistics.median(cold) / 1e3, 1),
        "one_region_gb_s": round(moved / statistics.median(warm) / 1e3, 1),
        "resolve_alone_us": round(statistics.median(alone), 1),
        "resolve_beside_us": round(statistics.median(beside), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    report = {"regions": options.regions, "machine": machine(), "transparent_hugepage": huge.read_text().strip(), "results": []}
    for way in WAYS:
        report["results"].append(measure(way, options.regions))
        print(json.dumps(report["results"][-1]), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
