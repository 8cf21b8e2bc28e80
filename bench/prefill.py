"""Prefill: attention backends at the Llama-3.1-8B shape, and the whole prefill with --full.

    python -m bench.prefill --out bench/results/prefill.json
    python -m bench.prefill --full --ctx 131072 --out bench/results/prefill_128k.json
    python -m bench.prefill --full --snapshot /data/doc --out bench/results/prefill_snapshot.json

The first form times ONE layer's attention of a few chunks of the prompt, flash against
cuDNN; the sum over all chunks is interpolated between those and says so. --full prefills
random weights (time, memory and agreement, never quality): first and second prompt, a
second question on the same document, and the last token's logits against transformers'
own prefill where that fits. --snapshot also saves the document's cache, loads it and asks.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.machine import machine
from bench.shapes import random_model
from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.kernels.split_attention import cudnn_attention, cudnn_is_faster, flash_attention
from offload_runtime.prefill import GPU_CHUNK_TOKENS

SHAPE, LAYERS, HEADS, KV_HEADS, DIM = "llama-3.1-8b", 32, 32, 8, 128
REPEATS = 3  # a chunk takes 1 to 100 ms; the spread is in the results
QUESTION_TOKENS = 64
COMPARED_TOKENS = 32768  # transformers' prefill with its DynamicCache beside the weights, well within 80 GB
BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"flash": flash_attention, "cudnn": cudnn_attention}


def chunk_flop(start: int, count: int) -> int:
    """q k^T and p v, 2 flop each a pair and number: `count` queries over the keys before and in the chunk."""
    return 4 * HEADS * DIM * (count * start + count * (count + 1) // 2)


def milliseconds(work: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def attention(ctx: int, chunk: int) -> dict[str, Any]:
    """One layer's attention of the first, second, middle and last chunk with each backend."""
    rows = torch.randn(KV_HEADS, ctx, 2 * DIM, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, chunk, HEADS, DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    starts = sorted({0, min(chunk, ctx - chunk), (ctx // 2) // chunk * chunk, ctx - chunk})
    before = time.perf_counter()
    chosen = cudnn_is_faster(0, torch.bfloat16, HEADS, KV_HEADS, DIM)
    report: dict[str, Any] = {
        "chosen": "cudnn" if chosen else "flash",
        "trial_s": time.perf_counter() - before,
        "ctx": ctx,
        "chunk": chunk,
        "backends": {},
    }
    for name, attend in BACKENDS.items():
        lines = [time_chunk(attend, query, rows[:, : start + chunk], start) for start in starts]
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
    first = milliseconds(lambda: attend(query, rows, DIM**-0.5))
    peak = torch.cuda.max_memory_allocated() - held
    times = [milliseconds(lambda: attend(query, rows, DIM**-0.5)) for _ in range(REPEATS)]
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


def run(
    om: OffloadedModel, ids: torch.Tensor, weights: int, resume: bool = False
) -> tuple[dict[str, Any], Any]:
    """One generate call of 1 new token: figures, and its output with logits."""
    out = om.generate(
        ids,
        max_new_tokens=1,
        do_sample=False,
        resume=resume,
        return_dict_in_generate=True,
        output_logits=True,
    )
    s = om.stats
    above = s["gpu_prefill_peak_gb"] - weights / 1e9
    figures = {
        "tokens": ids.shape[1],
        "reused": s["reused_tokens"],
        "ttft_s": s["ttft_s"],
        "peak_above_weights_gb": above,
    }
    print(json.dumps(figures), flush=True)
    return figures, out


def full(ctx: int, snapshot: Path | None) -> dict[str, Any]:
    """The whole prefill: a first prompt, another one, a second question; transformers; a snapshot."""
    model = random_model(SHAPE, ctx)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(0, 128000, (3, ctx - 2 * QUESTION_TOKENS), device="cuda")
    document, other = ids[:1], ids[1:2]
    asked = torch.cat([document, ids[2:, :QUESTION_TOKENS]], 1)
    report: dict[str, Any] = {"weights_gb": weights / 1e9}
    with OffloadedModel(model, RuntimeConfig(ctx=ctx)) as om:
        report["first_prompt"], _ = run(om, other, weights)  # pins host memory and makes attention plans too
        report["second_prompt"], _ = run(om, document, weights)
        if snapshot is not None:
            report["save_s"] = seconds(lambda: om.save_cache(snapshot))
        report["second_question"], answer = run(om, asked, weights, resume=True)
    if snapshot is not None:
        report |= from_snapshot(model, ctx, snapshot, asked, answer, weights)
    report["against_transformers"] = compare(model, document[:, : min(COMPARED_TOKENS, document.shape[1])])
    return report


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def from_snapshot(
    model: PreTrainedModel, ctx: int, snapshot: Path, asked: torch.Tensor, answer: Any, weights: int
) -> dict[str, Any]:
    """Load the document's cache and ask the second question again."""
    with OffloadedModel(model, RuntimeConfig(ctx=ctx)) as om:
        load_s = seconds(lambda: om.load_cache(snapshot))
        figures, again = run(om, asked, weights, resume=True)
    same = torch.equal(again.sequences, answer.sequences)
    size = sum(file.stat().st_size for file in snapshot.iterdir())
    figures |= {"same_tokens": same, "same_logits": torch.equal(again.logits[0], answer.logits[0])}
    return {
        "load_s": load_s,
        "snapshot_gb": size / 1e9,
        "load_includes": "pinning",
        "loaded_question": figures,
    }


def compare(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """The last token's logits and the time of transformers' own prefill, its cache kept as usual."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with OffloadedModel(model, RuntimeConfig(ctx=ids.shape[1] + 1)) as om:
        ours, out = run(om, ids, weights)
    torch.cuda.reset_peak_memory_stats()
    held: list[torch.Tensor] = []
    with torch.no_grad():
        theirs_s = seconds(lambda: held.append(model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]))
    peak = torch.cuda.max_memory_allocated() - weights
    got, expected = out.logits[0].float(), held[0].float()
    return {
        "tokens": ids.shape[1], "ours": ours, "transformers_ttft_s": theirs_s,
        "transformers_peak_above_weights_gb": peak / 1e9,
        "same_argmax": bool(got.argmax() == expected.argmax()),
        "largest_difference": float((got - expected).abs().max()), "spread_of_logits": float(expected.std()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument("--chunk", type=int, default=GPU_CHUNK_TOKENS)
    parser.add_argument("--full", action="store_true", help="the whole model's prefill too")
    parser.add_argument("--snapshot", type=Path, help="with --full: save, load and ask from this directory")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.prefill needs a CUDA GPU")
    report: dict[str, Any] = {"shape": SHAPE, "machine": machine()}
    report["attention"] = attention(options.ctx, options.chunk)
    for name, backend in report["attention"]["backends"].items():
        whole_s, rate = backend["all_layers_all_chunks_s"], backend["tflop_s"]
        print(f"{name}: {whole_s:.1f} s, {rate:.0f} TFLOP/s (interpolated)", flush=True)
    if options.full:
        torch.cuda.empty_cache()
        report["full"] = full(options.ctx, options.snapshot)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
