"""Decode speed of ours beside an in-GPU dense decode and a streaming offload, in one process.

    python -m bench.decode --shape llama-3.1-8b --ctx 262144 --out bench/results/decode.json

Weights and cache contents are random (no prefill): every step selects afresh,
which is the worst case for reuse. Each line says so: `no-locality`.
`measured-locality` lines drive the queries so that consecutive selections
overlap as much as --overlap says (bench/locality.py measures it on real models).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.baselines import dense_step_ms, streaming_step_ms
from bench.driven import DrivenSession
from bench.machine import machine
from bench.shapes import random_model
from offload_runtime import RuntimeConfig
from offload_runtime.adapter import ModelAdapter

GB = 1e9


def measure(
    adapter: ModelAdapter, config: RuntimeConfig, batch: int, overlap: float | None, steps: int
) -> dict[str, Any]:
    """Median step time of one setting, and what its steps moved."""
    session = DrivenSession(adapter, config, batch, overlap)
    session.fill()
    for _ in range(session.settle_steps):
        session.advance()
    moved_before = session.moved_bytes()
    times = [session.timed_step() for _ in range(steps)]
    moved = (session.moved_bytes() - moved_before) / steps
    median = statistics.median(times)
    layout = session.layout
    result = {
        "tpot_ms": round(median, 3),
        "p20_ms": round(sorted(times)[steps // 5], 3),
        "p80_ms": round(sorted(times)[steps * 4 // 5], 3),
        "tokens_per_s": round(batch * 1000 / median, 2),
        "moved_mb_per_step": round(moved / 1e6, 2),
        "gather_gb_s_over_step": round(moved / median / 1e6, 2),
        "selected_overlap": session.measured_overlap(),
        "pinned_gb": round(layout.layers * layout.host_bytes / GB, 3),
        "gpu_cache_gb": round(layout.gpu_bytes / GB, 3),
        "graph": session.decoder.graph is not None,
    }
    session.close()
    return result


def link_gb_s() -> float:
    """Host-to-device rate of a 256 MiB pinned copy: the ceiling for gathers."""
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return host.nbytes / statistics.median(times) / 1e6


def parse_setting(text: str) -> dict[str, Any]:
    """budget:mode[:new_rows][:overlap=x] -> settings of one line of the table."""
    budget, mode, *rest = text.split(":")
    setting: dict[str, Any] = {"budget": budget, "prefetch": mode, "new_rows": None, "overlap": None}
    for item in rest:
        name, value = item.split("=")
        setting[name] = float(value) if name == "overlap" else int(value)
    return setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--settings", nargs="+", default=["2048:correct", "2048:predict", "2048:off", "1/16:correct"]
    )
    parser.add_argument("--baselines", nargs="*", default=["dense", "streaming"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    adapter = ModelAdapter(random_model(options.shape, options.ctx))
    report: dict[str, Any] = {
        "shape": options.shape, "ctx": options.ctx, "batch": options.batch, "steps": options.steps,
        "machine": machine(), "link_gb_s": round(link_gb_s(), 2), "results": [],
    }  # fmt: skip
    baselines = {"dense": dense_step_ms, "streaming": streaming_step_ms}
    with torch.no_grad():
        for name in options.baselines:
            line: dict[str, Any] = {
                "what": name,
                "tpot_ms": baselines[name](adapter, options.ctx, options.batch),
            }
            report["results"].append(line)
            print(json.dumps(line), flush=True)
        for text in options.settings:
            setting = parse_setting(text)
            overlap = setting.pop("overlap")
            config = RuntimeConfig(ctx=options.ctx, **setting)
            line = {"what": "ds-offload", **setting}
            line["locality"] = "no-locality" if overlap is None else f"measured-locality {overlap}"
            line |= measure(adapter, config, options.batch, overlap, options.steps)
            report["results"].append(line)
            print(json.dumps(line), flush=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
