"""A decode step's matrix products: torch's own, torch's over weights laid together, and every tile of ours.

    python -m bench.fused_products [--shape llama-3.1-8b] [--batches 1 4 8] --out bench/results/products.json

Weights of several layers are read in turn, in a CUDA graph, so that none is in L2. Takes seconds, and
3.5 GB of GPU memory at the 8B shape.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload_runtime.bench.machine import machine
from offload_runtime.bench.shapes import shape_config
from offload_runtime.bench.timing import graph_ms, step_ms
from offload_runtime.kernels.products import Tile, tiles
from offload_runtime.product_trial import Work
from offload_runtime.products import gated_work, joint_products

LAYERS = 6
# Beside those that a run chooses from: more and less of a row at a time.
MORE_ONE_TOKEN = (Tile(1, 2048, 4), Tile(4, 2048, 4), Tile(4, 512, 4), Tile(2, 1024, 2), Tile(8, 512, 4))
MORE_FEW_TOKENS = (Tile(16, 128, 4, 5), Tile(16, 256, 2, 4), Tile(32, 256, 4, 3), Tile(64, 128, 4, 4))


def sites_of(shape: str) -> Iterator[tuple[str, Work, int, tuple[int, ...]]]:
    """Name, what is computed, inputs and outputs of the products that read a model's weights."""
    config = shape_config(shape, 4096)
    width, heads = config.hidden_size, config.num_attention_heads
    dim = getattr(config, "head_dim", None) or width // heads
    kv = config.num_key_value_heads * dim
    yield "q, k, v", joint_products, width, (heads * dim, kv, kv)
    yield "o", joint_products, heads * dim, (width,)
    yield "gate, up, SiLU", gated_work("silu"), width, (config.intermediate_size,) * 2
    yield "down", joint_products, config.intermediate_size, (width,)


def random_layers(width: int, rows: Sequence[int], device: torch.device) -> list[list[nn.Linear]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(count: int) -> nn.Linear:
        return nn.Linear(width, count, bias=False, device=device, dtype=dtype)

    return [[make(count) for count in rows] for _ in range(LAYERS)]


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    if device.type == "cuda":
        return 1e3 * graph_ms(calls)
    return 1e3 * min(step_ms(call, device) for call in calls)


def rows_of(
    name: str, work: Work, width: int, rows: Sequence[int], batch: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One row for each way to make these products."""
    layers = random_layers(width, rows, device)
    x = torch.randn(batch, 1, width, device=device).to(layers[0][0].weight.dtype)
    size = sum(part.weight.nbytes for part in layers[0])
    more = MORE_ONE_TOKEN if batch == 1 else MORE_FEW_TOKENS
    ways: dict[str, list[Callable[[], object]]] = {}
    for tile in (None, *tiles(batch), *more):
        label = "torch" if tile is None else "rows {} block {} warps {} stages {}".format(*tile)
        ways[label] = [partial(work, layer, x, tile) for layer in layers]
    if len(rows) > 1:
        joined = [torch.cat([part.weight for part in layer]) for layer in layers]
        ways["torch, weights laid together"] = [partial(nn.functional.linear, x, weight) for weight in joined]
    for label, calls in ways.items():
        try:
            us = microseconds(calls, device)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:  # one row's failure is that row's
            yield {"product": name, "batch": batch, "way": label, "error": str(error).splitlines()[0]}
            continue
        gb_s = size / us / 1e3
        yield {"product": name, "batch": batch, "way": label, "us": round(us, 2), "gb_s": round(gb_s)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, Any] = {"shape": options.shape, "machine": machine(), "rows": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in options.batches:
        for site in sites_of(options.shape):
            for row in rows_of(*site, batch, device):
                report["rows"].append(row)
                print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"rows": len(report["rows"]), "out": str(options.out)}))


if __name__ == "__main__":
    main()
