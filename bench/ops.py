"""Time ops of kernels/ at one shape against measured ceilings: python -m bench.ops [--only OP] [--sweep].

The default shape is one layer of Llama-3.1-8B at 262,144 tokens. Prints a
table and, as its last line, one JSON object. (Not called kernels.py: with
bench/ on the path, transformers would import that as Hugging Face's `kernels`.)
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offload_runtime.bench.machine import machine
from offload_runtime.bench.timing import graph_ms, hbm_copy_gb_s, hbm_read_gb_s, pinned_copy_gb_s
from offload_runtime.kernels.admission import empty_candidates, most_candidates
from offload_runtime.kernels.admit_cluster import admit_in_clusters, choose_in_clusters
from offload_runtime.kernels.append import append_rows
from offload_runtime.kernels.gather import gather_rows, gather_rows_triton
from offload_runtime.kernels.history import REMEMBERED, empty_history
from offload_runtime.kernels.labels import code_width, make_labels, make_labels_triton
from offload_runtime.kernels.query_labels import query_labels, query_labels_triton
from offload_runtime.kernels.residency import WHOLE, resolve
from offload_runtime.kernels.scores import label_scores, label_scores_triton
from offload_runtime.kernels.select_cluster import cluster_select_available, select_by_labels_cluster
from offload_runtime.kernels.sparse_decode import sparse_attention, sparse_attention_triton
from offload_runtime.kernels.topk import select_topk

LAYERS = 4  # buffer sets a graph cycles through: 4 x 42 MB is more than an H100's 50 MB of L2
WHAT = {"hbm": "an HBM copy", "hbm_read": "an HBM sum", "pcie": "a pinned copy"}
INT32: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}


@dataclass
class Shape:
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    tokens: int = 262_144
    sinks: int = 4
    recent: int = 64

    def row_bytes(self) -> int:
        return 4 * self.dim  # K and V in bfloat16

    def lengths(self) -> torch.Tensor:
        return torch.full((self.batch,), self.tokens, **INT32)


@dataclass
class Timing:
    """One measurement: bytes is what the op must move through `link` at least."""

    op: str
    config: str
    bytes: int
    link: str  # "hbm" (a copy), "hbm_read" (a sum), "pcie", or "" where latency is the point
    us: float = 0.0


Calls = list[Callable[[], object]]


def random_selection(shape: Shape, budget: int) -> torch.Tensor:
    """Ascending random tokens [B, Hkv, K], another set for every head."""
    width = shape.batch * shape.kv_heads
    span = shape.tokens - shape.sinks - shape.recent
    picks = [torch.randperm(span, device="cuda")[:budget].sort().values for _ in range(width)]
    chosen = torch.stack(picks).view(shape.batch, shape.kv_heads, budget)
    return (chosen + shape.sinks).int()


def configs(op: Callable, tuned: Callable, sweep: bool, options: list[dict]) -> list[tuple[str, Callable]]:
    """The public op, and for a sweep its Triton version under each set of options."""
    found = [("default", op)]
    if sweep:
        for option in options:
            name = " ".join(f"{k}={v}" for k, v in option.items())
            found.append((name, partial(tuned, **option)))
    return found


def bench_scores(shape: Shape, bits: int, channels: int, sweep: bool):
    b, h, n = shape.batch, shape.kv_heads, shape.tokens
    dtype = torch.float16 if bits == 16 else torch.uint8
    width = code_width(channels, bits)
    codes = [torch.ones(b, h, n, width, dtype=dtype, device="cuda") for _ in range(LAYERS)]
    scales = [torch.ones(b, h, n, 2, dtype=torch.float16, device="cuda") for _ in range(LAYERS)]
    scores = [torch.empty(b, h, n, device="cuda") for _ in range(LAYERS)]
    query = torch.randn(b, shape.heads, channels, device="cuda")
    offsets = torch.zeros(b, shape.heads, device="cuda")
    moved = b * h * n * (width * codes[0].element_size() + 4 * (bits < 16) + 4)
    options = [
        {"block_bytes": 4096},
        {"program_tokens": 1024},
        {"program_tokens": 2048},
        {"num_stages": 3},
        {"num_stages": 6},
        {"num_warps": 8},
    ]
    rest = (shape.lengths(), shape.sinks, shape.recent)
    for name, op in configs(label_scores, label_scores_triton, sweep, options):
        buffers = zip(codes, scales, scores, strict=True)
        calls = [partial(op, query, offsets, c, s, bits, *rest, o) for c, s, o in buffers]
        yield Timing(f"label_scores {channels} x {bits} bit", name, moved, "hbm"), calls


def bench_topk(shape: Shape, budget: int):
    b, h, n = shape.batch, shape.kv_heads, shape.tokens
    scores = [torch.randn(b, h, n, device="cuda") for _ in range(LAYERS)]
    tokens = torch.empty(b, h, budget, **INT32)
    counts, budgets = torch.empty(b, h, **INT32), torch.full((b, h), budget, **INT32)
    args = (budgets, shape.lengths(), shape.sinks, shape.recent, tokens, counts)
    calls: Calls = [partial(select_topk, s, *args) for s in scores]
    yield Timing(f"select_topk k={budget}", "default", 4 * b * h * (n + budget), "hbm"), calls


def bench_select(shape: Shape, bits: int, channels: int, budget: int, new_rows: int):
    """Scores and selection in one kernel; new_rows 0: exact selection."""
    b, h, n = shape.batch, shape.kv_heads, shape.tokens
    width = code_width(channels, bits)
    if bits == 16:
        codes = [torch.randn(b, h, n, width, device="cuda").half() for _ in range(LAYERS)]
    else:
        size = (b, h, n, width)
        codes = [torch.randint(256, size, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)]
    # Labels of spread 1, as of random keys, and scores within the range of the selection's bins.
    scales = torch.tensor([0.22, -1.63], device="cuda").half().expand(b, h, n, 2).contiguous()
    query = torch.randn(b, shape.heads, channels, device="cuda")
    offsets = torch.full((b, shape.heads), 25.0, device="cuda")
    tokens, counts = torch.full((b, h, budget), -1, **INT32), torch.zeros(b, h, **INT32)
    budgets, fixed = torch.full((b, h), budget, **INT32), (shape.sinks, shape.recent)
    moved = b * h * n * (width * codes[0].element_size() + 4 * (bits < 16)) + 4 * b * h * budget
    name = f"{channels} x {bits} bit, k={budget}"
    labels = [(query, offsets, c, scales, bits) for c in codes]
    if not new_rows:
        exact: tuple[Any, ...] = (budgets, shape.lengths(), *fixed, tokens, counts)
        calls: Calls = [partial(select_by_labels_cluster, *label, *exact) for label in labels]
        yield Timing(f"select {name}", "cluster", moved, "hbm"), calls
        return
    # 1.75 k tokens of the last eight steps' selections, half of them of the last one's.
    history = empty_history(b, h, n, "cuda")
    history.random_(1, 256)
    history *= torch.rand(history.shape, device="cuda") < 1.75 * budget / n
    candidates = empty_candidates(b, h, most_candidates(budget, n), "cuda")
    limits: tuple[Any, ...] = (budgets, new_rows, shape.lengths(), *fixed)
    maps, step, misses = empty_residency(b, h, n, 2 * budget, budget)
    slots = (maps, step, 1, REMEMBERED, misses)
    sticky = (*limits, history, False, tokens, counts, candidates, *slots)
    calls = [partial(admit_in_clusters, *label, *sticky) for label in labels]
    yield Timing(f"admit {name}, {new_rows} new", "cluster", moved, "hbm"), calls
    chosen = (tokens.clone(), counts.clone(), tokens.clone(), maps[0], maps[2], step)
    for phase, name in ((0, "a prediction's"), (1, "the true")):
        rest = (False, *chosen, phase, misses[3])
        choice = partial(choose_in_clusters, candidates, budgets, shape.sinks, history, *rest)
        yield Timing(f"choose k={budget}, {name}", "cluster", 0, ""), [choice] * LAYERS


def empty_residency(b: int, h: int, n: int, n_slots: int, budget: int) -> tuple[Any, torch.Tensor, Any]:
    """Slot maps of an empty resident set, a step, and lists of misses, as resolve_reference has them."""
    maps = tuple(torch.full((b, h, size), -1, **INT32) for size in (n, n_slots, 2 * n_slots))
    maps = (*maps[:2], maps[2].view(b, h, n_slots, 2), torch.zeros(b, h, **INT32))
    lists = (torch.empty(b, h, budget, **INT32), torch.empty(b, h, budget, **INT32))
    counters = torch.zeros(b, 2, 4, dtype=torch.int64, device="cuda")
    return maps, torch.ones(1, **INT32), (*lists, torch.empty(b, h, **INT32), counters)


def bench_resolve(shape: Shape, budget: int):
    """Two selections that share half their tokens take turns, so every call has hits and misses."""
    b, h, n_slots = shape.batch, shape.kv_heads, budget * 5 // 4
    both = random_selection(shape, budget * 3 // 2)  # [B, Hkv, 1.5 K]
    first = both[..., :budget].contiguous()
    second = both[..., budget // 2 :].contiguous()
    maps, step, misses = empty_residency(b, h, shape.tokens, n_slots, budget)
    counts, steps = torch.full((b, h), budget, **INT32), (step, step + 1)
    calls: Calls = [
        partial(resolve, *(chosen, counts, *maps, step, 1, True, 0, WHOLE, *misses))
        for chosen, step in [(first, steps[0]), (second, steps[1])] * 2
    ]
    yield Timing(f"resolve k={budget}, half missed", "default", 0, ""), calls


def bench_gather(shape: Shape, misses: int, host_rows: torch.Tensor, sweep: bool):
    b, h = shape.batch, shape.kv_heads
    slots = torch.empty(b, h, misses, 2 * shape.dim, dtype=torch.bfloat16, device="cuda")
    tokens = [random_selection(shape, misses) for _ in range(LAYERS)]
    places = torch.arange(misses, **INT32).expand(b, h, misses).contiguous()
    counts = torch.full((b, h), misses, **INT32)
    options = [
        {"num_programs": programs, "block_bytes": size, "num_warps": warps}
        for programs, size, warps in [
            (16, 8192, 4),
            (32, 4096, 4),
            (32, 16384, 4),
            (48, 8192, 4),
            (16, 16384, 8),
        ]
    ]
    moved = b * h * misses * shape.row_bytes()
    for name, op in configs(gather_rows, gather_rows_triton, sweep, options):
        calls = [partial(op, host_rows, t, places, counts, slots, 0) for t in tokens]
        yield Timing(f"gather_rows {misses} a head", name, moved, "pcie"), calls


def bench_append(shape: Shape, host_rows: torch.Tensor):
    b, h, d = shape.batch, shape.kv_heads, shape.dim
    key = torch.randn(b, h, d, device="cuda").bfloat16()
    slots = torch.empty(b, h, shape.sinks + shape.recent, 2 * d, dtype=torch.bfloat16, device="cuda")
    args = (key, key, shape.lengths(), slots, shape.sinks, shape.recent, host_rows)
    calls: Calls = [partial(append_rows, *args)] * LAYERS
    yield Timing("append_rows", "default", 0, ""), calls


def bench_make_labels(shape: Shape, new_tokens: int, sweep: bool):
    b, h, d, channels = shape.batch, shape.kv_heads, shape.dim, 32
    keys = torch.randn(b, new_tokens, h, d, device="cuda").bfloat16().transpose(1, 2)  # [B, Hkv, T, D]
    key_map, key_mean = torch.randn(h, channels, d, device="cuda"), torch.zeros(h, d, device="cuda")
    codes = torch.empty(b, h, shape.tokens, channels // 2, dtype=torch.uint8, device="cuda")
    scales = torch.empty(b, h, shape.tokens, 2, dtype=torch.float16, device="cuda")
    args = (keys, key_map, key_mean, torch.zeros(b, **INT32), codes, scales, 4)
    options = [{"block_tokens": 32}, {"block_tokens": 128}, {"block_tokens": 128, "num_warps": 8}]
    moved = b * h * new_tokens * (2 * d + channels // 2 + 4)
    for name, op in configs(make_labels, make_labels_triton, sweep and new_tokens > 1, options):
        calls: Calls = [partial(op, *args)] * LAYERS
        yield Timing(f"make_labels T={new_tokens}", name, moved, "hbm" if new_tokens > 1 else ""), calls


def bench_query_labels(shape: Shape, sweep: bool):
    b, h, d, channels = shape.batch, shape.kv_heads, shape.dim, 32
    query = torch.randn(b, shape.heads, d, device="cuda").bfloat16()
    query_map, key_mean = (
        torch.randn(shape.heads, channels, d, device="cuda"),
        torch.zeros(h, d, device="cuda"),
    )
    slots = torch.zeros(b, h, shape.sinks + shape.recent, 2 * d, dtype=torch.bfloat16, device="cuda")
    args = (query, query_map, key_mean, slots, shape.lengths(), shape.sinks, shape.recent, d**-0.5, True)
    for name, op in configs(
        query_labels,
        query_labels_triton,
        sweep,
        [{"num_warps": 8}, {"block_rows": 32}, {"block_channels": 32}],
    ):
        calls: Calls = [partial(op, *args)] * LAYERS
        yield Timing("query_labels", name, 0, ""), calls


def bench_attention(shape: Shape, budget: int, by_slots: bool, sweep: bool):
    """by_slots: the list says where the rows lie, as a sticky selection's does; else which tokens'."""
    b, h, d = shape.batch, shape.kv_heads, shape.dim
    local = shape.sinks + shape.recent
    query = torch.randn(b, shape.heads, d, device="cuda").bfloat16()
    slots = [
        torch.zeros(b, h, local + budget, 2 * d, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS)
    ]
    tokens = random_selection(shape, budget)
    slot_of_token = torch.full((b, h, shape.tokens), -1, **INT32)
    places = torch.randperm(budget, device="cuda").int().expand(b, h, budget)
    slot_of_token.scatter_(2, tokens.long(), places)
    counts = torch.full((b, h), budget, **INT32)
    listed = (places.contiguous(), counts, None) if by_slots else (tokens, counts, slot_of_token)
    args = (*listed, shape.lengths(), shape.sinks, shape.recent, d**-0.5)
    options: list[dict[str, int]] = [
        {"programs": 616},
        {"programs": 1056},
        {"num_stages": 3},
        {"num_warps": 4},
        {"programs": 1056, "block_bytes": 8192, "num_warps": 1},
        {"programs": 1056, "block_bytes": 8192, "num_stages": 3, "num_warps": 1},
        {"programs": 512, "block_bytes": 8192, "num_stages": 4, "num_warps": 4},
    ]
    moved = b * h * (budget + local) * shape.row_bytes()
    for name, op in configs(sparse_attention, sparse_attention_triton, sweep, options):
        calls = [partial(op, query, s, *args) for s in slots]
        by = ", by slots" if by_slots else ""
        yield Timing(f"sparse_attention k={budget}{by}", name, moved, "hbm_read"), calls


def all_benches(shape: Shape, sweep: bool):
    yield from bench_scores(shape, 4, 32, sweep)
    yield from bench_scores(shape, 16, 16, sweep)
    for budget in (2048, 16_384):
        yield from bench_topk(shape, budget)
        yield from bench_resolve(shape, budget)
        yield from bench_attention(shape, budget, False, sweep)
        yield from bench_attention(shape, budget, True, sweep)
    rows = (shape.batch, shape.kv_heads, shape.tokens, 2 * shape.dim)
    host_rows = torch.empty(rows, dtype=torch.bfloat16, pin_memory=True)
    yield from bench_append(shape, host_rows)
    for misses in (256, 2048, 8192):
        yield from bench_gather(shape, misses, host_rows, sweep)
    for new_tokens in (1, 8192):
        yield from bench_make_labels(shape, new_tokens, sweep)
    yield from bench_query_labels(shape, sweep)
    if cluster_select_available(torch.device("cuda"), shape.tokens):
        for bits, channels in ((4, 32), (16, 16)):
            for budget, new_rows in ((2048, 0), (16_384, 0), (16_384, 2048)):
                yield from bench_select(shape, bits, channels, budget, new_rows)


def report(timing: Timing, ceilings: dict[str, float]) -> dict:
    """Print one line of the table; return it as numbers."""
    result = asdict(timing)
    line = f"{timing.op:32} {timing.config:52} {timing.us:9.1f} us"
    if timing.link:
        result["gb_s"] = round(timing.bytes / timing.us / 1e3, 1)
        result["of_ceiling"] = round(result["gb_s"] / ceilings[timing.link], 3)
        line += f" {result['gb_s']:8.0f} GB/s {100 * result['of_ceiling']:4.0f}% of {WHAT[timing.link]}"
    print(line, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true", help="also try other launch configurations")
    parser.add_argument("--only", default="", help="time only ops whose names begin so")
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    parser.add_argument("--batch", type=int, default=Shape.batch)
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.ops times kernels on a CUDA GPU, and torch finds none here.")
    shape = Shape(batch=options.batch, tokens=options.tokens)
    torch.manual_seed(0)
    ceilings = {"hbm": hbm_copy_gb_s(), "hbm_read": hbm_read_gb_s(), "pcie": pinned_copy_gb_s()}
    print(", ".join(f"{WHAT[name]} {rate:.0f} GB/s" for name, rate in ceilings.items()))
    results = []
    for timing, calls in all_benches(shape, options.sweep):
        if not timing.op.startswith(options.only):
            continue
        timing.us = round(graph_ms(calls) * 1e3, 2)
        results.append(report(timing, ceilings))
    figures = {"machine": machine(), "shape": asdict(shape), "ceilings": ceilings, "ops": results}
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
