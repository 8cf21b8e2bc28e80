"""What pinning a region costs, by page size, and what kernel launches wait for meanwhile.

    python -m bench.pinning --out bench/results/pinning.json
    python -m bench.pinning --mib 64 --regions 2 --out /tmp/pinning.json

The second form runs on a CPU too, where nothing is registered. Each way makes `regions` regions
one after another: seconds a GiB to populate and to register each; then again in a thread while
this one launches small kernels: its longest launch, and the share of the time in launches longer
than a millisecond, beside the same without pinning. Rows are on disk as soon as they are there.
"""

import argparse
import json
import mmap
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offload_runtime.bench.machine import machine
from offload_runtime.cache.pinned import PAGE_BYTES, mapped, populate, register

LONG_S = 1e-3  # a launch that waited for somebody: launches take some 5 us
ALONE_S = 0.5
TOUCH_BLOCK_BYTES = 64 << 20  # a thread's piece in the way before


def shared_touched(size: int) -> np.ndarray:
    """The way before: shared 4 KiB pages, written one by one, a thread for every 64 MiB."""
    pages = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)

    def touch(start: int) -> None:
        pages[start : start + TOUCH_BLOCK_BYTES : PAGE_BYTES] = 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(touch, range(0, size, TOUCH_BLOCK_BYTES)))
    return pages


def private_populated(size: int) -> np.ndarray:
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(region, dtype=np.uint8)
    populate(pages)
    return pages


def product(size: int) -> np.ndarray:
    pages = mapped(size)
    populate(pages)
    return pages


WAYS: dict[str, Callable[[int], np.ndarray]] = {
    "shared 4 KiB, touched (before)": shared_touched,
    "private 4 KiB, populated": private_populated,
    "private 2 MiB, populated (registered memory now)": product,
}


def pin(make: Callable[[int], np.ndarray], size: int, regions: int) -> dict[str, Any]:
    """Seconds a GiB of each region's two parts, and of giving all back."""
    held, populating, registering = [], [], []
    for _ in range(regions):
        began = time.perf_counter()
        held.append(make(size))
        made = time.perf_counter()
        if torch.cuda.is_available():
            register(held[-1])
        populating.append(made - began)
        registering.append(time.perf_counter() - made)
    began, gib = time.perf_counter(), size / 2**30
    held.clear()
    return {
        "populate_s_gib": statistics.median(populating) / gib,
        "populate_first_s_gib": populating[0] / gib,
        "register_s_gib": statistics.median(registering) / gib,
        "free_s_gib": (time.perf_counter() - began) / gib / regions,
    }


def launches(until: Callable[[], bool]) -> dict[str, float]:
    """Small kernels launched in a row until then."""
    numbers = torch.zeros(1024, device="cuda" if torch.cuda.is_available() else "cpu")
    began = before = time.perf_counter()
    longest = waited = 0.0
    while not until():
        numbers.add_(1)
        now = time.perf_counter()
        longest = max(longest, now - before)
        waited += now - before if now - before > LONG_S else 0.0
        before = now
    return {"longest_launch_ms": 1e3 * longest, "share_in_long_launches": waited / (before - began)}


def beside(make: Callable[[int], np.ndarray], size: int, regions: int) -> dict[str, Any]:
    """Launches while the regions are made in another thread, which takes so long."""
    result: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: result.update(pin(make, size, regions)))
    thread.start()
    told = launches(lambda: not thread.is_alive())
    thread.join()
    return {**told, "populate_s_gib": result["populate_s_gib"], "register_s_gib": result["register_s_gib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="+", default=[128, 1024], help="of one region")
    parser.add_argument("--regions", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(), "cores": os.cpu_count(), "rows": []}
    ends = time.perf_counter() + ALONE_S
    report["launches_alone"] = launches(lambda: time.perf_counter() > ends)
    for mib in options.mib:
        for name, make in WAYS.items():
            row: dict[str, Any] = {"way": name, "mib": mib}
            try:
                row |= pin(make, mib << 20, options.regions)
                row["beside_launches"] = beside(make, mib << 20, options.regions)
            except (MemoryError, OSError, RuntimeError) as error:
                row["failed"] = str(error)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
