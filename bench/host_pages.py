"""What decides the gather rate: the pages behind pinned memory, the kernel, the regions it cycles through.

    python -m bench.host_pages --regions 30 --ways "shared 4 KiB" --out bench/results/host_pages.json

A gather of 2,048 ascending rows of 512 B from each of 8 heads cycles through
`regions` layers of 1 GiB, as decode does, for each way to allocate them and
each gather kernel; and region by region beside a plain copy of each. A resolve
(2,048 misses among 16,384 selected tokens a head) is timed alone and while each
gather runs on another stream. Everything is timed inside CUDA graphs.
"""

import argparse
import json
import mmap
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from offload_runtime.bench.machine import machine
from offload_runtime.bench.ops import empty_residency
from offload_runtime.cache.managed import managed_pages
from offload_runtime.cache.pinned import populate, register
from offload_runtime.kernels.attention_trial import event_ms
from offload_runtime.kernels.gather import gather_rows_triton
from offload_runtime.kernels.gather_bulk import gather_bulk_available, gather_rows_bulk
from offload_runtime.kernels.residency import WHOLE, resolve

HEADS, TOKENS, ROW, ROWS = 8, 262144, 256, 2048  # Llama-3.1-8B shape: 1 GiB a layer, 512 B rows
REGION_BYTES = HEADS * TOKENS * ROW * 2
MOVED_BYTES = HEADS * ROWS * ROW * 2
BUDGET = TOKENS // 16
REPEATS = 20  # gathers or resolves in a graph of one kind
COVERING_GATHERS = 120  # 20 ms and more: far longer than REPEATS resolves beside them


def mapped(flags: int, huge: bool) -> torch.Tensor:
    region = mmap.mmap(-1, REGION_BYTES, flags=flags)
    if huge:
        region.madvise(mmap.MADV_HUGEPAGE)
    pages = np.frombuffer(region, dtype=np.uint8)
    populate(pages)
    register(pages)
    return as_rows(pages)


def managed() -> torch.Tensor:
    pages = managed_pages(REGION_BYTES, torch.device("cuda", torch.cuda.current_device()))
    assert pages is not None, "this machine has no managed memory"
    return as_rows(pages)


def as_rows(pages: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pages).view(torch.bfloat16).view(1, HEADS, TOKENS, ROW)


WAYS: dict[str, Callable[[], torch.Tensor]] = {
    "shared 4 KiB": lambda: mapped(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, False),
    "managed": managed,
    "private huge": lambda: mapped(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, True),
    "cudaHostAlloc": lambda: torch.empty(1, HEADS, TOKENS, ROW, dtype=torch.bfloat16, pin_memory=True),
}


def integers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


def draw_tokens(count: int) -> torch.Tensor:
    chosen = [torch.randperm(TOKENS, device="cuda")[:count] for _ in range(HEADS)]
    return torch.stack(chosen).int()[None]  # [1, Hkv, count], in random order


def ascending(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.sort(-1).values.contiguous()


def timed_us(run: Callable[[], object]) -> float:
    return event_ms(run) * 1000


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    run()  # compiles, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    """Median microseconds of one of the calls in a graph."""
    return round(statistics.median(timed_us(graph.replay) for _ in range(5)) / calls, 1)


def kernels() -> dict[str, Callable[..., None]]:
    """The gathers by name."""
    found: dict[str, Callable[..., None]] = {"triton": gather_rows_triton}
    if gather_bulk_available(torch.device("cuda"), ROW * 2):
        for ctas in (4, 8, 16):
            found[f"bulk, {ctas} CTAs"] = partial(gather_rows_bulk, num_ctas=ctas)
        found["bulk, 8 CTAs of 32 KiB rings"] = partial(gather_rows_bulk, ring_bytes=32 * 1024)
    return found


class Gathers:
    """One gather kernel over regions of host rows."""

    def __init__(self, host: list[torch.Tensor], kernel: Callable[..., None]) -> None:
        self.host, self.kernel = host, kernel
        self.draws = [ascending(draw_tokens(ROWS)) for _ in host]
        places = torch.arange(ROWS, dtype=torch.int32, device="cuda")
        self.places = places.expand(1, HEADS, ROWS).contiguous()
        self.slots = torch.empty(1, HEADS, ROWS, ROW, dtype=torch.bfloat16, device="cuda")
        self.counts = {rows: integers(1, HEADS) + rows for rows in (0, ROWS)}

    def run(self, regions: list[int], rows_a_head: int = ROWS) -> None:
        """Gather from each of the regions, one after the other."""
        for region in regions:
            misses = (self.draws[region], self.places, self.counts[rows_a_head])
            self.kernel(self.host[region], *misses, self.slots, 0)


def resolves() -> torch.cuda.CUDAGraph:
    """REPEATS resolves of two selections in turn; each misses ROWS of the BUDGET tokens a head."""
    drawn = draw_tokens(BUDGET + ROWS)
    selections = [ascending(drawn[..., :BUDGET]), ascending(drawn[..., ROWS:])]  # [1, Hkv, K]
    count = torch.full((1,), BUDGET, dtype=torch.int32, device="cuda")
    maps, step, misses = empty_residency(1, HEADS, TOKENS, BUDGET, BUDGET)

    def resolve_all() -> None:
        for i in range(REPEATS):
            resolve(*(selections[i % 2], count, *maps, step, i % 2, bool(i % 2), 0, WHOLE, *misses))

    graph = captured(resolve_all)
    assert (misses[2] == ROWS).all()
    return graph


def beside_us(graph: torch.cuda.CUDAGraph, gathers: torch.cuda.CUDAGraph, replays: int) -> float | None:
    """Microseconds of one resolve while gathers run on another stream; None if those ended first."""
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    gathered = torch.cuda.Event()
    with torch.cuda.stream(first):
        for _ in range(replays):
            gathers.replay()
        gathered.record()
    with torch.cuda.stream(second):
        torch.cuda._sleep(2_000_000)  # 1 ms or so: the gathers are under way
        start.record()
        graph.replay()
        end.record()
    end.synchronize()
    covered = not gathered.query()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) * 1000 / REPEATS, 1) if covered else None


def measure(way: str, regions: int) -> dict[str, object]:
    host = [WAYS[way]() for _ in range(regions)]
    resolving = resolves()
    every, one = list(range(regions)), [0] * REPEATS
    resolve_us: dict[str, float | None] = {"alone": replay_us(resolving, REPEATS)}
    gathers: dict[str, dict[str, float]] = {}
    for name, kernel in kernels().items():
        work = Gathers(host, kernel)
        cycling = captured(partial(work.run, every))
        us = replay_us(cycling, regions)
        one_region_us = replay_us(captured(partial(work.run, one)), REPEATS)
        gathers[name] = {
            "us": us,
            "gb_s": round(MOVED_BYTES / us / 1e3, 1),
            "one_region_gb_s": round(MOVED_BYTES / one_region_us / 1e3, 1),
            "nothing_missed_us": replay_us(captured(partial(work.run, one, 0)), REPEATS),
        }
        resolve_us[name] = beside_us(resolving, cycling, -(-COVERING_GATHERS // regions))
        print(json.dumps({name: gathers[name], "resolve_us": resolve_us[name]}), flush=True)
    plain = Gathers(host, gather_rows_triton)
    by_region = [timed_us(partial(plain.run, [region])) for region in every]
    landing = torch.empty_like(host[0], device="cuda")
    copied = [timed_us(partial(landing.copy_, rows, non_blocking=True)) for rows in host]
    return {
        "way": way,
        "gathers": gathers,
        "resolve_us": resolve_us,
        "triton_us_by_region": [round(us) for us in by_region],
        "copy_gb_s_by_region": [round(REGION_BYTES / us / 1e3, 1) for us in copied],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--regions", type=int, default=16)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    report = {
        "regions": options.regions,
        "machine": machine(),
        "transparent_hugepage": huge.read_text().strip(),
        "results": [],
    }
    for way in options.ways:
        report["results"].append(measure(way, options.regions))
        print(json.dumps(report["results"][-1]), flush=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
