"""How well a layer's selection is predicted from its predecessor's input, and what correcting that gains.

    python -m bench.prediction --model DIR --calibrate wealth_of_nations.txt --test moby_dick.txt --out FILE

A prediction runs layer i's attention module on layer i - 1's input. Corrections, from a calibration text:
    none    the input as it is (Double Sparsity's way)
    shift   plus what layer i - 1 adds on average (calibration_shift.py)
    rank R  the best affine guess of what is missing, of rank R (calibration_guess.py; what the runtime does)
    affine  the same of full rank: as much as any affine correction can gain
Recall is the part of the best N/16 keys by the true query that the predicted query finds among its own.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.machine import machine
from offload_runtime.bench.one_document import document, model_parser
from offload_runtime.calibrate_command import BLOCK_TOKENS
from offload_runtime.calibration_collect import make_blocks
from offload_runtime.calibration_guess import (
    Regression,
    add_layer,
    measure_recalls,
    solve_all,
    stacked,
    watch,
)
from offload_runtime.calibration_shift import ShiftSums
from offload_runtime.devices import choose_device
from offload_runtime.evals.cases import Tokens
from offload_runtime.input_guess import InputCorrection, guess_rank
from offload_runtime.loading import load_model, load_tokenizer


class Learned:
    """What a calibration text gave, and the corrections that follow from it."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter, self.shifts = adapter, ShiftSums()
        self.regressions: dict[int, Regression] = {}

    def learn(self, index: int, hidden: torch.Tensor, before: torch.Tensor, _: dict[str, Any]) -> None:
        self.shifts.add(index, hidden, before)
        add_layer(self.regressions, self.adapter, index, before, hidden)

    def corrections(self) -> dict[str, InputCorrection]:
        adapter, width = self.adapter, self.adapter.shape.hidden
        layers, place = len(adapter.layers), (adapter.dtype, adapter.device)
        full = guess_rank(width)
        found = {
            "none": InputCorrection(None, None, *place),
            "shift": InputCorrection(self.shifts.means([False] + [True] * (layers - 1)), None, *place),
        }
        for rank in (full // 4, full // 2, full, width):
            parts = solve_all(adapter, self.regressions, rank)
            name = "affine" if rank == width else f"rank {rank}"
            found[name] = InputCorrection(None, stacked(parts, layers), *place)
        return found


def main() -> None:
    parser = model_parser(__doc__, tokens=8192)
    parser.add_argument("--calibrate", type=Path, required=True, help="text that corrections come from")
    parser.add_argument("--test", type=Path, required=True, help="another text, which the document is from")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    options = parser.parse_args()
    adapter = ModelAdapter(load_model(options.model, choose_device(options.device)))
    tokens, learned = Tokens(load_tokenizer(options.model)), Learned(adapter)
    known = tokens.rest(options.calibrate.read_text(encoding="utf-8"))
    for block in make_blocks(known, tokens.prefix(""), options.calibration_tokens, BLOCK_TOKENS, seed=0):
        watch(adapter, block, learned.learn, lambda *_: None)
    ids = document(tokens, options.test, options.tokens)
    layers = list(measure_recalls(adapter, ids, learned.corrections()).values())
    means = {name: round(fmean(layer[name] for layer in layers), 4) for name in layers[0]}
    rows = [{name: round(value, 4) for name, value in layer.items()} for layer in layers]
    for index, layer in enumerate(rows, 1):
        print(f"layer {index:2}  " + "  ".join(f"{name} {value:.3f}" for name, value in layer.items()))
    print("means     " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
    report = {
        "model": Path(options.model).name,
        "tokens": len(ids),
        "calibrate": options.calibrate.name,
        "test": options.test.name,
        "machine": machine(),
        "means": means,
        "layers": rows,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
