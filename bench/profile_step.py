"""Where the microseconds of one decode step go.

    python -m bench.profile_step --settings 2048:correct:none 1/16:correct:2048 --out profile.json
    python -m bench.profile_step ... --without-products   # torch's own matrix products, for an A/B

Prints every kernel's share of a step and the kernels of two middle layers in
the order in which they started, with their stream; before that, the median of
steps that no profiler watches. Random weights, no locality.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from offload_runtime import RuntimeConfig
from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.driven import DrivenSession
from offload_runtime.bench.host_store import HostStore
from offload_runtime.bench.machine import machine
from offload_runtime.bench.shapes import random_model
from offload_runtime.devices import free_unused
from offload_runtime.fusion import Fusion
from offload_runtime.product_trial import choices

STEPS = 3
TIMED_STEPS = 30
SETTLE_STEPS = 16  # compile, capture, and let the resident set reach its steady state


def kernel_events(session: DrivenSession, trace: Path) -> list[dict[str, Any]]:
    """Kernel and copy events of STEPS steps, by start time (microseconds)."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            session.advance()
        torch.cuda.synchronize()
    recorded.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(kernels, key=lambda event: event["ts"])


def by_kernel(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Total microseconds and launches a step of every kernel name (a graph has many streams)."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        entry = total[event["name"][:70]]
        entry[0] += event["dur"] / STEPS
        entry[1] += 1 / STEPS
    rows = [
        {"kernel": name, "us_per_step": round(us, 1), "launches": round(count, 1)}
        for name, (us, count) in total.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])


def middle_layers(events: list[dict[str, Any]], layers: int) -> list[str]:
    """Start, duration, stream and name of the kernels of two layers, from one attention's combine on."""
    ends = [i for i, event in enumerate(events) if "_combine_kernel" in event["name"]]
    first, last = ends[layers + layers // 2], ends[layers + layers // 2 + 2]
    zero = events[first]["ts"]
    return [
        f"{e['ts'] - zero:8.1f} {e['dur']:7.1f} s{e['args']['stream']:<4} {e['name'][:60]}"
        for e in events[first : last + 1]
    ]


def measure(adapter: ModelAdapter, setting: str, ctx: int, store: HostStore, options: Any) -> dict[str, Any]:
    """Profile one setting, "budget:prefetch:new rows", and print what was found."""
    budget, mode, new_rows = setting.split(":")
    config = RuntimeConfig(ctx=ctx, budget=budget, prefetch=mode, new_rows=new_rows)
    session = DrivenSession(adapter, config, 1, store)
    if options.without_products:
        session.decoder.fusion = Fusion(adapter, 1, products=False)
    session.restart(SETTLE_STEPS + TIMED_STEPS + STEPS)
    for _ in range(SETTLE_STEPS):
        session.advance()
    median = statistics.median(session.timed_step() for _ in range(TIMED_STEPS))
    events = kernel_events(session, options.out.with_suffix(".trace.json"))
    table, timeline = by_kernel(events), middle_layers(events, len(adapter.layers))
    span = (events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]) / STEPS
    print(f"\n{setting}: median {median:.2f} ms a step, {span:.0f} us under the profiler")
    for row in table[: options.rows]:
        print(f"{row['us_per_step']:9.1f} us {row['launches']:6.1f} x  {row['kernel']}")
    print("\n".join(timeline), flush=True)
    session.close()
    free_unused(adapter.device)
    return {
        "setting": setting,
        "median_ms": median,
        "us_per_step": span,
        "kernels": table,
        "middle_layers": timeline,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument(
        "--settings", nargs="+", default=["2048:correct:none"], help="budget:prefetch:new rows"
    )
    parser.add_argument("--rows", type=int, default=25, help="kernels to print of each setting")
    parser.add_argument("--without-products", action="store_true", help="torch's own matrix products")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    adapter = ModelAdapter(random_model(options.shape, options.ctx))
    elements = options.ctx * adapter.kv_heads * 2 * adapter.head_dim
    store = HostStore(len(adapter.layers), elements, adapter.dtype, adapter.device)
    with torch.no_grad():
        profiles = [measure(adapter, name, options.ctx, store, options) for name in options.settings]
    tiles = {f"{key[0]} {key[1]}": tile for key, tile in choices().items()}  # None: torch's own was faster
    print("\n".join(f"{name}: {tile or 'own'}" for name, tile in tiles.items()))
    report = {"ctx": options.ctx, "tiles": tiles, "machine": machine(), "profiles": profiles}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".trace.json").unlink()


if __name__ == "__main__":
    main()
