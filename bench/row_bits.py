"""What rows in fewer bits would cost: a document read with every key and value rounded as they would be kept.

    python -m bench.row_bits --model DIR --text moby_dick.txt --tokens 4096 --out FILE

All rows are rounded, also those that the runtime keeps on the GPU as they are (sinks, recent ones, what a
prefill attends to), so this is more than an offloaded session would lose. Attention reads all of them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.bench.machine import machine
from offload_runtime.bench.one_document import document, model_parser
from offload_runtime.calibration_collect import attend
from offload_runtime.devices import choose_device
from offload_runtime.evals.cases import Tokens
from offload_runtime.loading import load_model, load_tokenizer

Rounding = Callable[[torch.Tensor], torch.Tensor]
LARGEST_E4M3 = 448.0
SCORED = 512  # tokens whose logits are made at a time; the last two pieces are compared with exact rows


def integers(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x [..., n] as integers of `bits` bits, signed, with one scale for each n numbers."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / most
    return (x / scale).round() * scale


def in_groups(x: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """The same with a scale for each `size` numbers."""
    return integers(x.unflatten(-1, (-1, size)), bits).flatten(-2)  # [..., D / size, size]


def e4m3(x: torch.Tensor, scaled: bool) -> torch.Tensor:
    """x [..., n] as floating point numbers of 8 bits; scaled: the largest of n becomes the format's own."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST_E4M3 if scaled else torch.ones(())
    held = (x / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return held.to(x.dtype) * scale.to(x.dtype)


ROUNDINGS: dict[str, Rounding] = {
    "exact": lambda x: x,
    "e4m3": lambda x: e4m3(x, False),
    "e4m3, a scale a key or value": lambda x: e4m3(x, True),
    "int8, a scale a key or value": lambda x: integers(x, 8),
    "int8, a scale for 32 numbers": lambda x: in_groups(x, 32, 8),
    "int4, a scale for 32 numbers": lambda x: in_groups(x, 32, 4),
}


def read(adapter: ModelAdapter, ids: torch.Tensor, rounding: Rounding) -> tuple[float, torch.Tensor]:
    """Bits of ids [T] but the first, and log-probabilities [n, V] of the last pieces."""

    def handle(call: AttentionCall) -> torch.Tensor:
        return attend(replace(call, key=rounding(call.key), value=rounding(call.value)))

    with adapter.handled_by([handle] * len(adapter.layers)):
        hidden = adapter.base(input_ids=ids[None], use_cache=False)[0][0]  # [T, E]
    bits, last = 0.0, list[torch.Tensor]()
    for start in range(0, len(ids) - 1, SCORED):
        follow = ids[start + 1 : start + 1 + SCORED]
        logits = adapter.model.get_output_embeddings()(hidden[start : start + len(follow)])
        scores = logits.float().log_softmax(-1)  # [n, V]
        bits -= scores.gather(1, follow[:, None]).sum().item() / math.log(2)
        last = [*last[-1:], scores]
    return bits, torch.cat(last)


@torch.no_grad()
def compare(adapter: ModelAdapter, ids: torch.Tensor, size: int) -> list[dict[str, Any]]:
    """One row a rounding; size: bytes of the text that ids [T] but the first are."""
    rows: list[dict[str, Any]] = []
    exact = torch.empty(0)
    for name, rounding in ROUNDINGS.items():
        bits, scores = read(adapter, ids, rounding)
        exact = scores if name == "exact" else exact
        rows.append(
            {
                "rows": name,
                "bits_per_byte": round(bits / size, 5),
                "more_percent": round(100 * (bits / size / rows[0]["bits_per_byte"] - 1), 3) if rows else 0.0,
                "kl": round((exact.exp() * (exact - scores)).sum(-1).mean().item(), 6),
                "same_best_token": round((scores.argmax(-1) == exact.argmax(-1)).float().mean().item(), 4),
            }
        )
    return rows


def main() -> None:
    parser = model_parser(__doc__, tokens=4096)
    parser.add_argument("--text", type=Path, required=True)
    options = parser.parse_args()
    adapter = ModelAdapter(load_model(options.model, choose_device(options.device)))
    tokenizer = load_tokenizer(options.model)
    ids = document(Tokens(tokenizer), options.text, options.tokens)
    rows = compare(adapter, ids.to(adapter.device), len(tokenizer.decode(ids[1:]).encode()))
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    figures = {"model": Path(options.model).name, "text": options.text.name, "tokens": len(ids), "rows": rows}
    options.out.write_text(json.dumps(figures | {"machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
