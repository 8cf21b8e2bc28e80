"""Where the microseconds of one decode step go.

    python -m bench.profile_step --ctx 262144 --setting 2048:correct --out bench/results/profile.json
    python -m bench.profile_step ... --without-products   # torch's own matrix products, for an A/B

Prints every kernel's share of a step and the kernels of one middle layer in
the order in which they started, with their stream.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from offload_runtime import RuntimeConfig
from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.driven import DrivenSession
from offload_runtime.bench.machine import machine
from offload_runtime.bench.shapes import random_model
from offload_runtime.fusion import Fusion
from offload_runtime.product_trial import choices

STEPS = 3
SETTLE_STEPS = 6  # compile, capture, and let the resident set reach its steady state


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
    """Total microseconds and launches a step of every kernel name and stream."""
    total: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        entry = total[event["name"][:70], event["args"]["stream"]]
        entry[0] += event["dur"] / STEPS
        entry[1] += 1 / STEPS
    rows = [
        {"kernel": name, "stream": stream, "us_per_step": round(us, 1), "launches": round(count, 1)}
        for (name, stream), (us, count) in total.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])


def middle_layer(events: list[dict[str, Any]], layers: int) -> list[str]:
    """Start, duration, stream and name of the kernels from one attention combine to the next but one."""
    ends = [i for i, event in enumerate(events) if "_combine_kernel" in event["name"]]
    first, last = ends[layers + layers // 2], ends[layers + layers // 2 + 1]
    zero = events[first]["ts"]
    return [
        f"{e['ts'] - zero:8.1f} {e['dur']:7.1f} s{e['args']['stream']:<4} {e['name'][:60]}"
        for e in events[first : last + 1]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument("--setting", default="2048:correct", help="budget:prefetch[:new rows]")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--without-products", action="store_true", help="torch's own matrix products")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    adapter = ModelAdapter(random_model(options.shape, options.ctx))
    budget, mode, *rest = options.setting.split(":")
    new_rows = rest[0] if rest else None
    config = RuntimeConfig(ctx=options.ctx, budget=budget, prefetch=mode, new_rows=new_rows)
    with torch.no_grad():
        session = DrivenSession(adapter, config, 1)
        if options.without_products:
            session.decoder.fusion = Fusion(adapter, 1, products=False)
        session.restart(SETTLE_STEPS + STEPS)
        for _ in range(SETTLE_STEPS):
            session.advance()
        events = kernel_events(session, options.out.with_suffix(".trace.json"))
    table, timeline = by_kernel(events), middle_layer(events, len(adapter.layers))
    span = (events[-1]["ts"] + events[-1]["dur"] - events[0]["ts"]) / STEPS
    print(f"{span:.0f} us a step, setting {options.setting}")
    for row in table[: options.rows]:
        print(f"{row['us_per_step']:9.1f} us {row['launches']:6.1f} x  s{row['stream']:<4} {row['kernel']}")
    print("\n".join(timeline))
    tiles = {f"{key[0]} {key[1]}": tile for key, tile in choices().items()}  # None: torch's own was faster
    print("\n".join(f"{name}: {tile or 'own'}" for name, tile in tiles.items()))
    report = {
        "setting": options.setting,
        "tiles": tiles,
        "machine": machine(),
        "us_per_step": span,
        "kernels": table,
    }
    options.out.write_text(json.dumps(report | {"middle_layer": timeline}, indent=1) + "\n")
    options.out.with_suffix(".trace.json").unlink()


if __name__ == "__main__":
    main()
