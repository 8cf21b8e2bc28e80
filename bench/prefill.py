"""Prefill: attention backends at the Llama-3.1-8B shape, and with --full everything about the first token.

    python -m bench.prefill --out bench/results/prefill_attention.json
    python -m bench.prefill --full --snapshot /tmp/doc --out bench/results/prefill.json
    python -m bench.prefill --full --shape toy --contexts 256 512 1024 --snapshot /tmp/toy --out /tmp/toy.json

The first form times ONE layer's attention of a few chunks of the prompt with every
attention there is; the sum over all chunks is interpolated between those and says so. --full (with random
weights: time, memory and agreement, never quality) writes a row for each of: first token at
every context beside transformers' own prefill, a document saved, loaded and asked, the same
on an emulated small card, planned against measured, and where the time goes.
The last form tries --full out on anything, a CPU too.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from offload_runtime.bench.flex import flex_prefill_attention
from offload_runtime.bench.machine import machine
from offload_runtime.bench.plan_times import TimesOfPlan
from offload_runtime.bench.prefill_full import PrefillBench
from offload_runtime.bench.prefill_parts import run_document, run_ours, run_profile, run_theirs, run_whole
from offload_runtime.bench.rows import Rows
from offload_runtime.bench.shapes import random_model
from offload_runtime.kernels.attention_trial import REASONS, candidates, event_ms
from offload_runtime.prefill import GPU_CHUNK_TOKENS
from offload_runtime.prefill_backend import PrefillBackend

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128  # of Llama-3.1-8B
REPEATS = 3  # a chunk takes 1 to 100 ms; the spread is in the results
# In order of worth, since rows that there is no time for are left out.
PARTS = ("ours", "document", "theirs", "profile", "times", "offloaded", "whole")


def chunk_flop(start: int, count: int) -> int:
    """q k^T and p v, 2 flop each a pair and number: `count` queries over the keys before and in the chunk."""
    return 4 * HEADS * DIM * (count * start + count * (count + 1) // 2)


def attention(ctx: int, chunk: int) -> dict[str, Any]:
    """One layer's attention of the first, second, middle and last chunk with each backend."""
    rows = torch.randn(KV_HEADS, ctx, 2 * DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, chunk, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    starts = sorted({0, min(chunk, ctx - chunk), (ctx // 2) // chunk * chunk, ctx - chunk})
    before = time.perf_counter()
    backend = PrefillBackend()
    backend.choose(torch.zeros_like(rows), HEADS, chunk, ctx)
    report: dict[str, Any] = {
        "chosen": backend.name,
        "trial_ms": backend.trial,
        "trial_s": time.perf_counter() - before,
        "ctx": ctx,
        "chunk": chunk,
        "backends": {},
    }
    for name, attend in (candidates() | {"flex": flex_prefill_attention}).items():
        try:
            lines = [time_chunk(attend, query, rows[:, : start + chunk], start) for start in starts]
        except REASONS as error:
            report["backends"][name] = {"failed": str(error)[:300]}
            continue
        medians = [line["median_ms"] for line in lines]
        all_chunks = [interpolate(starts, medians, start) for start in range(0, ctx - chunk + 1, chunk)]
        whole_s = LAYERS * sum(all_chunks) / 1e3
        report["backends"][name] = {
            "chunks": lines,
            "all_layers_all_chunks_s": whole_s,
            "how": "sum over chunks, times between the measured ones interpolated linearly, times 32 layers",
            "tflop_s": LAYERS * chunk_flop(0, ctx) / whole_s / 1e12,
        }
    return report


def time_chunk(
    attend: Callable[..., torch.Tensor], query: torch.Tensor, rows: torch.Tensor, start: int
) -> dict[str, float]:
    """first_ms includes what the backend prepares for a new shape."""
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    first = event_ms(lambda: attend(query, rows, DIM**-0.5))
    peak = torch.cuda.max_memory_allocated() - held
    times = [event_ms(lambda: attend(query, rows, DIM**-0.5)) for _ in range(REPEATS)]
    median = statistics.median(times)
    return {
        "start": start, "first_ms": first, "median_ms": median, "min_ms": min(times), "max_ms": max(times),
        "tflop_s": chunk_flop(start, query.shape[2]) / median / 1e9, "peak_mib": peak / 2**20,
    }  # fmt: skip


def interpolate(places: list[int], values: list[float], place: int) -> float:
    for (a, b), (low, high) in zip(itertools.pairwise(places), itertools.pairwise(values), strict=True):
        if place <= b:
            return low + (high - low) * (place - a) / (b - a)
    return values[-1]


def run_times(model: PreTrainedModel, contexts: list[int], rows: Rows) -> None:
    for ctx in contexts:
        TimesOfPlan(model, ctx, "2048", rows).add_all()


def full(options: argparse.Namespace) -> None:
    """Rows of one model, each on disk as soon as it is there."""
    began = time.perf_counter()
    model = random_model(options.shape, options.contexts[-1] + 1024)
    head = {"shape": options.shape, "machine": machine(), "model_s": time.perf_counter() - began}
    rows = Rows(options.out, head, options.seconds - head["model_s"])
    bench = PrefillBench(model, options.contexts, options.budget, options.card, rows)
    jobs: dict[str, Callable[[], object]] = {
        "ours": lambda: run_ours(bench),
        "document": lambda: run_document(bench, options.snapshot),
        "theirs": lambda: run_theirs(bench, offloading=False),
        "profile": lambda: run_profile(bench),
        "times": lambda: run_times(model, options.times_at, rows),
        "offloaded": lambda: run_theirs(bench, offloading=True),
        "whole": lambda: run_whole(bench),
    }
    for part in options.parts:
        jobs[part]()
    if options.snapshot is not None:
        shutil.rmtree(options.snapshot, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ctx", type=int, default=262144, help="of the attention alone")
    parser.add_argument("--chunk", type=int, default=GPU_CHUNK_TOKENS, help="of the attention alone")
    parser.add_argument("--full", action="store_true", help="the whole model's prefill")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--budget", default="1/16")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--snapshot", type=Path, help="directory to save the longest document's cache to")
    parser.add_argument("--card", type=float, default=24.0, help="GB of the small card")
    parser.add_argument("--times-at", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--seconds", type=float, default=360.0, help="rows that would end later are left out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.full:
        full(options)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench.prefill without --full needs a CUDA GPU")
    report: dict[str, Any] = {"machine": machine(), "attention": attention(options.ctx, options.chunk)}
    for name, backend in report["attention"]["backends"].items():
        if "failed" in backend:
            print(f"{name}: {backend['failed']}", flush=True)
            continue
        whole_s, rate = backend["all_layers_all_chunks_s"], backend["tflop_s"]
        print(f"{name}: {whole_s:.1f} s, {rate:.0f} TFLOP/s (interpolated)", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
