"""What sticky selection keeps of exact selection's attention mass, simulated on a model's queries and keys.

    python -m bench.sticky --model DIR --calibration FILE --text moby_dick.txt --out FILE.json

Selections of consecutive tokens of a text, K = N/16 for each KV head, by exact scores or by labels that are
not rounded: exactly, and with at most a part of K new a step, where tokens of the last W selections are not
new (of fewer, where those have too many tokens: kernels/history.py). Mass is that of all tokens attended to,
sinks and recent ones included; the rest of the runtime is left out, so that many variants cost one forward
pass. `ds-offload eval attention --new-rows` measures the runtime.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.bench.label_mass import SHARE
from offload_runtime.bench.machine import machine
from offload_runtime.bench.one_document import document, model_parser
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_collect import group_masses, grouped_products
from offload_runtime.calibration_guess import watch
from offload_runtime.calibration_mass import RECENT, SINKS
from offload_runtime.devices import choose_device
from offload_runtime.evals.cases import Tokens
from offload_runtime.kernels.history import members_of
from offload_runtime.kernels.sticky import sticky_topk_reference
from offload_runtime.loading import load_model, load_tokenizer

VARIANTS = ((4, 1), (4, 8), (8, 1), (8, 2), (8, 4), (8, 8), (16, 1), (16, 8), (32, 8))  # (K / C, W)


def masses(call: AttentionCall, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax mass [Hkv, P, T] of the last `steps` queries, group mean, and which tokens are far [P, T]."""
    keys, token = call.key[0].float(), torch.arange(call.key.shape[2], device=call.key.device)
    places = token[-steps:]
    summed = group_masses(call.query[0, :, places], keys, places, call.scale, call.window)
    mass = summed * len(keys) / call.query.shape[1]
    return mass, (token >= SINKS) & (token <= places[:, None] - RECENT)


def label_scores(
    call: AttentionCall, calibration: Calibration, index: int, far: torch.Tensor
) -> torch.Tensor:
    """What the runtime selects by, before labels are rounded: [Hkv, P, T], the group's summed shares."""
    parts = (calibration.key_map, calibration.query_map, calibration.key_mean)
    key_map, query_map, key_mean = (part[index].to(call.key.device) for part in parts)
    keys, queries = call.key[0].float(), call.query[0, :, -len(far) :].float()
    labels = (keys - key_mean[:, None]) @ key_map.mT  # [Hkv, T, R]
    scores = grouped_products(queries @ query_map.mT, labels) * call.scale  # [Hkv, G, P, T]
    scores += grouped_products(queries, key_mean[:, None]) * call.scale
    token = torch.arange(keys.shape[1], device=keys.device)
    unseen = token > token[-len(far) :, None]  # [P, T]
    # In units of the weight of a query head's sinks and recent tokens.
    near = grouped_products(queries, keys).mul(call.scale).masked_fill(far | unseen, float("-inf"))
    return (scores - near.logsumexp(-1, keepdim=True)).exp().sum(1)


def select(
    scores: torch.Tensor, far: torch.Tensor, mass: torch.Tensor, entering: int | None, window: int
) -> tuple[float, float]:
    """Mean mass attended to and new tokens a step; scores and mass [Hkv, P, T], far [P, T]."""
    heads, steps, tokens = scores.shape
    budget, device = tokens // SHARE, scores.device
    limit = budget if entering is None else entering  # K new ones are exact selection
    budgets = torch.full((1, heads), budget, dtype=torch.int32, device=device)
    length = torch.tensor([tokens], dtype=torch.int32, device=device)
    selection, counts = torch.empty(1, heads, budget, dtype=torch.int32, device=device), budgets.clone()
    history = torch.zeros(1, heads, tokens, dtype=torch.uint8, device=device)
    held, new = [], []
    for step in range(steps):
        history &= (1 << window) - 1
        members = torch.stack([members_of(past, budget, limit) for past in history[0]])  # [Hkv, T]
        ranked = scores[None, :, step].masked_fill(~far[step], -1.0)  # [1, Hkv, T]
        sticky_topk_reference(ranked, budgets, limit, length, 0, 0, history, True, selection, counts)
        chosen = history[0] & 1 != 0  # [Hkv, T]
        if step:
            new.append(float((chosen & ~members).sum()) / heads)
        held.append(float((mass[:, step] * (chosen | ~far[step])).sum(-1).mean()))
    return fmean(held), fmean(new)


def measure(
    adapter: ModelAdapter, calibration: Calibration, ids: torch.Tensor, steps: int
) -> list[dict[str, Any]]:
    """One dictionary a layer: {"exact" or "labels": {variant: (mass, new tokens)}}."""
    layers: list[dict[str, Any]] = []

    def handle(index: int, call: AttentionCall) -> None:
        mass, far = masses(call, steps)
        budget, row = mass.shape[2] // SHARE, {}
        for kind in ("exact", "labels"):
            scores = mass if kind == "exact" else label_scores(call, calibration, index, far)
            found = {"all": select(scores, far, mass, None, 1)}
            for part, window in VARIANTS:
                found[f"1/{part}, {window}"] = select(scores, far, mass, max(1, budget // part), window)
            row[kind] = found
        layers.append(row)
        print(f"layer {index}", flush=True)

    watch(adapter, ids, lambda *_: None, handle)
    return layers


def means(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over layers: mass, mass over exact selection's by the same scores, new tokens a step."""
    lines = []
    for kind in ("exact", "labels"):
        for variant in layers[0][kind]:
            pairs = [(layer[kind][variant], layer[kind]["all"][0]) for layer in layers]
            lines.append(
                {
                    "scores": kind,
                    "new, remembered": variant,
                    "mass": round(fmean(mass for (mass, _), _ in pairs), 4),
                    "of exact selection": round(fmean(mass / whole for (mass, _), whole in pairs), 4),
                    "new_rows": round(fmean(new for (_, new), _ in pairs), 1),
                }
            )
    return lines


def main() -> None:
    parser = model_parser(__doc__, tokens=4096)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="one that calibration has not seen")
    parser.add_argument("--steps", type=int, default=48)
    options = parser.parse_args()
    adapter = ModelAdapter(load_model(options.model, choose_device(options.device)))
    calibration = Calibration.load(options.calibration)
    calibration.check(adapter.model.config)
    ids = document(Tokens(load_tokenizer(options.model)), options.text, options.tokens)
    lines = means(measure(adapter, calibration, ids, options.steps))
    for line in lines:
        print("  ".join(f"{name} {value}" for name, value in line.items()))
    report = {
        "model": Path(options.model).name,
        "text": options.text.name,
        "tokens": len(ids),
        "steps": options.steps,
        "machine": machine(),
        "lines": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
