"""How well a layer's selection is predicted from its predecessor's input, and what correcting that gains.

    python -m bench.prediction --model DIR --calibrate wealth_of_nations.txt --test moby_dick.txt --out FILE

A prediction runs layer i's attention module on layer i - 1's input. Corrections, from a calibration text:
    none    the input as it is (Double Sparsity's way)
    shift   plus what layer i - 1 adds on average (calibration_shift.py; what the runtime does)
    rank R  plus the best affine guess of what layer i - 1 adds, of rank R (reduced-rank regression)
    affine  the same of full rank: as much as any affine correction can gain
Recall is the part of the best N/16 keys by the true query that the predicted query finds among its own.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.bench.machine import machine
from offload_runtime.calibrate_command import BLOCK_TOKENS
from offload_runtime.calibration_collect import attend, make_blocks, selection_recall
from offload_runtime.calibration_shift import SKIPPED_TOKENS, ShiftSums
from offload_runtime.devices import choose_device
from offload_runtime.evals.cases import Tokens
from offload_runtime.loading import load_model, load_tokenizer

RANKS = (8, 32, 64)
RIDGE = 1e-3  # of the mean square of the input; 8 x 4,096 tokens fit 576 inputs and more
SAMPLED = 48  # queries of the test text, spread over its last quarter

Correction = Callable[[torch.Tensor], torch.Tensor]  # input [T, E] -> corrected input [T, E]
Observer = Callable[[int, torch.Tensor, torch.Tensor, dict[str, Any]], None]
CallHandler = Callable[[int, AttentionCall], None]


@dataclass
class Regression:
    """Moments of one layer's predecessor's input and of what that layer adds, for affine guesses."""

    inputs: torch.Tensor  # [E + 1, E + 1] float64: input and a 1, squared
    products: torch.Tensor  # [E + 1, E] float64: with what is added

    @classmethod
    def of(cls, before: torch.Tensor, after: torch.Tensor) -> "Regression":
        """From inputs of two layers in a row, [T, E]."""
        before, after = before[SKIPPED_TOKENS:].double(), after[SKIPPED_TOKENS:].double()
        known = torch.cat([before, torch.ones_like(before[:, :1])], 1)
        return cls(known.T @ known, known.T @ (after - before))

    def add(self, other: "Regression") -> None:
        self.inputs += other.inputs
        self.products += other.products

    def guess(self, rank: int | None) -> Correction:
        """Input plus the best affine guess of what is added, its matrix of that rank; None: of full rank."""
        width = self.products.shape[1]
        known = self.inputs.clone()
        ridge = RIDGE * known.diagonal()[:-1].mean()
        known[:-1, :-1] += ridge * torch.eye(width, dtype=known.dtype, device=known.device)
        solved = torch.linalg.solve(known, self.products)
        matrix, offset = solved[:-1], solved[-1]
        if rank is not None:
            tokens = self.inputs[-1, -1]
            mean = self.inputs[-1, :-1] / tokens
            spread = self.inputs[:-1, :-1] / tokens - mean[:, None] * mean
            _, directions = torch.linalg.eigh(matrix.T @ spread @ matrix)  # of the guesses, ascending
            kept = directions[:, -rank:]
            low = matrix @ kept @ kept.T
            matrix, offset = low, offset + mean @ (matrix - low)
        weights, bias = matrix.float(), offset.float()
        return lambda hidden: hidden + (hidden.float() @ weights + bias).to(hidden.dtype)


@dataclass
class Found:
    """What the calibration text gave, by layer."""

    shifts: ShiftSums = field(default_factory=ShiftSums)
    regressions: dict[int, Regression] = field(default_factory=dict)

    def learn(self, index: int, hidden: torch.Tensor, before: torch.Tensor, _: dict[str, Any]) -> None:
        self.shifts.add(index, hidden, before)
        seen = Regression.of(before, hidden)
        if index in self.regressions:
            self.regressions[index].add(seen)
        else:
            self.regressions[index] = seen

    def corrections(self, index: int) -> dict[str, Correction]:
        shift, regression = self.shifts.mean(index), self.regressions[index]
        return {
            "none": lambda hidden: hidden,
            "shift": lambda hidden: hidden + shift.to(hidden.dtype),
            **{f"rank {rank}": regression.guess(rank) for rank in RANKS},
            "affine": regression.guess(None),
        }


@torch.no_grad()
def run(adapter: ModelAdapter, ids: torch.Tensor, observe: Observer, handle: CallHandler) -> None:
    """Dense attention over ids [T]; observe(layer, its input, that of the one before, keywords)."""
    before: list[torch.Tensor] = []

    def observer(index: int, hidden: torch.Tensor, keywords: dict[str, Any]) -> None:
        if before:
            observe(index, hidden[0], before.pop(), keywords)
        before.append(hidden[0].clone())

    def handler(index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def attention(call: AttentionCall) -> torch.Tensor:
            handle(index, call)
            return attend(call)

        return attention

    handlers = [handler(index) for index in range(len(adapter.layers))]
    with adapter.handled_by(handlers), adapter.observed_by(observer):
        adapter.base(input_ids=ids.to(adapter.device)[None], use_cache=False)


def measure(adapter: ModelAdapter, found: Found, ids: torch.Tensor) -> list[dict[str, float]]:
    """Recall of every layer but the first by correction, on ids [T]."""
    places = torch.linspace(len(ids) * 3 // 4, len(ids) - 1, SAMPLED).long().to(adapter.device)
    guesses: dict[int, dict[str, torch.Tensor]] = {}
    recalls = []

    def observe(index: int, _: torch.Tensor, before: torch.Tensor, keywords: dict[str, Any]) -> None:
        guesses[index] = {}
        for name, correct in found.corrections(index).items():
            query, _scale = adapter.predicted_query(index, correct(before)[None], keywords)
            guesses[index][name] = query[0, :, places]  # [Hq, P, D]

    def handle(index: int, call: AttentionCall) -> None:
        if index in guesses:
            asked = guesses.pop(index)
            recalls.append({name: selection_recall(call, query, places) for name, query in asked.items()})

    run(adapter, ids, observe, handle)
    return recalls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory or GGUF file")
    parser.add_argument("--calibrate", type=Path, required=True, help="text that corrections come from")
    parser.add_argument("--test", type=Path, required=True, help="another text")
    parser.add_argument("--tokens", type=int, default=8192, help="of the test text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    adapter = ModelAdapter(load_model(options.model, choose_device(options.device)))
    tokens, found = Tokens(load_tokenizer(options.model)), Found()
    known, unseen = (
        tokens.rest(file.read_text(encoding="utf-8")) for file in (options.calibrate, options.test)
    )
    for block in make_blocks(known, tokens.prefix(""), options.calibration_tokens, BLOCK_TOKENS, seed=0):
        run(adapter, block, found.learn, lambda *_: None)
    (document,) = make_blocks(unseen, tokens.prefix(""), options.tokens, options.tokens, seed=0)
    layers = measure(adapter, found, document)
    means = {name: round(fmean(layer[name] for layer in layers), 4) for name in layers[0]}
    rows = [{name: round(value, 4) for name, value in layer.items()} for layer in layers]
    for index, layer in enumerate(rows, 1):
        print(f"layer {index:2}  " + "  ".join(f"{name} {value:.3f}" for name, value in layer.items()))
    print("means     " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
    report = {
        "model": Path(options.model).name,
        "tokens": len(document),
        "calibrate": options.calibrate.name,
        "test": options.test.name,
        "machine": machine(),
        "means": means,
        "layers": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
