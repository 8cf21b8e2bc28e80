"""Which labels find the attention mass? Label methods, widths, bits and group combinations compared.

    python -m bench.labels --model DIR --name tiny-256k --calibrate A.txt --test B.txt --tokens 8192

Queries of the last quarter of a held-out text select N/16 keys per KV head, as decoding does:
sinks and recent tokens are always there. Reported, as means over layers, heads and queries:
    mass: share of the softmax on sinks + recent + selected tokens;
    far: of the softmax on selectable tokens (neither sinks nor recent), the share on selected ones.
Adds the model's table to bench/results/labels.json and redraws bench/results/labels.png.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.label_mass import COMBINATIONS, POPCOUNT, LayerSample, Maps, measure, sample_layers
from offload_runtime.calibration_collect import collect, make_blocks
from offload_runtime.calibration_learned import spread_positions
from offload_runtime.calibration_maps import LayerMoments, calibrate_layer, label_maps, spread

RESULTS = Path(__file__).parent / "results"


def identity_maps(sample: LayerSample) -> Maps:
    """Labels that are the keys themselves: exact scores."""
    kv_heads, _, dim = sample.keys.shape
    eye = torch.eye(dim)
    heads = sample.queries.shape[1]
    return eye.expand(heads, dim, dim), eye.expand(kv_heads, dim, dim), torch.zeros(kv_heads, dim)


def ridged_maps(moments: LayerMoments, channels: int, ridge: float) -> Maps:
    mean = moments.key_sum / moments.tokens
    cq, ck = moments.query / (moments.tokens * moments.group), moments.key / moments.tokens
    return (*label_maps(cq, ck, mean, channels, moments.group, ridge), mean.float())


def unrotated(maps: Maps) -> Maps:
    """The same projection without the rotation that evens out its channels."""
    back = spread(maps[1].shape[1]).float().T
    return back @ maps[0], back @ maps[1], maps[2]


def widened(maps: Maps, channels: int) -> Maps:
    """The same approximation in twice as many channels: a second, random rotation beside the first one."""
    queries, keys, mean = maps
    size = keys.shape[1]
    assert channels == 2 * size
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    turned = torch.linalg.qr(noise).Q
    return torch.cat([queries, turned @ queries], 1) / 2, torch.cat([keys, turned @ keys], 1), mean


def label_bytes(channels: int, bits: int) -> int:
    """Bytes a key with its scales: a float16 pair (scale, offset), one for signs, none for popcount."""
    if bits == POPCOUNT:
        return channels // 8
    return channels * bits // 8 + {1: 2, 16: 0}.get(bits, 4)


LABELS = (
    *(("channels", r, 16) for r in (8, 16, 32)),
    *(("channels", r, 4) for r in (16, 32, 64)),
    *(("greedy", r, 16) for r in (8, 16, 32)),
    *(("greedy", r, 4) for r in (16, 32, 64)),
    *(("projection", r, bits) for r in (16, 32, 64) for bits in (16, 8, 4)),
    *(("projection", r, 2) for r in (32, 64)),
    *(("projection", r, bits) for r in (64, 128) for bits in (1, POPCOUNT)),
)


def table(
    samples: list[LayerSample], moments: list[LayerMoments], own: dict[tuple[int, str], list[Maps]]
) -> dict[str, Any]:
    """All measurements of one model."""
    runtime = "sum, local normaliser"
    exact = [identity_maps(sample) for sample in samples]
    projected = {r: [m.maps(r, "projection") for m in moments] for r in (16, 32, 64)}
    rows: list[dict[str, Any]] = []
    dim = samples[0].keys.shape[-1]
    for method, channels, bits in LABELS:
        maps = [m.maps(min(channels, dim), method) for m in moments]
        if channels > dim:
            maps = [widened(layer, channels) for layer in maps]
        row = {"method": method, "channels": channels, "bits": bits, "bytes": label_bytes(channels, bits)}
        rows.append(row | measure(samples, maps, bits, runtime))
        print(rows[-1], flush=True)
    combined = {
        name: {
            "exact": measure(samples, exact, 32, name),
            "32 x 4 bit": measure(samples, projected[32], 4, name),
        }
        for name in COMBINATIONS
    }
    print(combined, flush=True)
    ridges = {
        str(ridge): measure(samples, [ridged_maps(m, 32, ridge) for m in moments], 4, runtime)
        for ridge in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    }
    print(ridges, flush=True)
    return {
        "exact": combined["sum, full normaliser"]["exact"],
        "labels": rows,
        "combinations": combined,
        "ridge, projection 32 x 4 bit": ridges,
        "rotation left out": {
            f"{r} x {bits} bit": measure(samples, [unrotated(m) for m in projected[r]], bits, runtime)
            for r in (32, 64) for bits in (8, 4)
        },
        "calibrated on the first tokens of the prompt, projection 32 x 4 bit": {
            f"{tokens} tokens, {how}": measure(samples, maps, 4, runtime)
            for (tokens, how), maps in own.items()
        },
    }  # fmt: skip


def own_maps(
    adapter: ModelAdapter, token_ids: torch.Tensor, samples: list[LayerSample]
) -> dict[tuple[int, str], list[Maps]]:
    """What a model without a file can make from the first tokens of a prompt.

    At their own positions, or turned to positions drawn from the model's whole range.
    """
    maps = {}
    for tokens in (64, 256, 1024, 4096):
        maps[tokens, "own positions"] = [
            calibrate_layer(s.all_queries[:, :tokens], s.keys[:, :tokens], 32) for s in samples
        ]
        turned = collect(adapter, [token_ids[:tokens]], adapter.trained_positions, seed=0)
        maps[tokens, "all positions"] = [m.maps(32, "projection") for m in turned.layer_moments()]
    return maps


def load(directory: str) -> tuple[ModelAdapter, Any]:
    """A model directory, or one that holds a single GGUF file."""
    packed = sorted(Path(directory).glob("*.gguf"))
    source = {"gguf_file": packed[0].name} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **source)
    return ModelAdapter(model.eval()), AutoTokenizer.from_pretrained(directory, **source)


def read_tokens(tokenizer: Any, path: str) -> torch.Tensor:
    text = Path(path).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def draw(results: dict[str, Any], path: Path) -> None:
    """Far mass found over bytes a key, one panel a model."""
    from matplotlib import pyplot as plt

    names = {1: "projection, signs and a scale", POPCOUNT: "projection, signs of both (popcount)"}
    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    for panel, (name, result) in zip(panels[0], results.items(), strict=True):
        for method, bits, mark in (
            ("channels", 16, "s"),
            ("channels", 4, "v"),
            ("greedy", 16, "P"),
            ("greedy", 4, "X"),
            ("projection", 16, "o"),
            ("projection", 8, "^"),
            ("projection", 4, "D"),
            ("projection", 2, "<"),
            ("projection", 1, "."),
            ("projection", POPCOUNT, "*"),
        ):
            rows = [r for r in result["labels"] if (r["method"], r["bits"]) == (method, bits)]
            if not rows:
                continue  # measured before this kind of label was
            points = [(r["bytes"], r["far"]) for r in rows]
            panel.plot(*zip(*points, strict=True), mark + "-", label=names.get(bits, f"{method}, {bits} bit"))
            for row, point in zip(rows, points, strict=True):
                panel.annotate(row["channels"], point, (3, 4), textcoords="offset points", fontsize=7)
        panel.axhline(result["exact"]["far"], color="grey", ls="--", label="exact scores")
        panel.set(xscale="log", xlabel="label bytes a key", ylabel="far attention mass found")
        panel.set_title(f"{name}: N {result['tokens']:,} over {result['positions']:,} positions")
        panel.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        panel.legend(fontsize=8)
    figure.suptitle("One selection of N/16 keys per KV head; numbers are R")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=keep_lines)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--name", required=True, help="the model's name in the results")
    parser.add_argument("--calibrate", required=True, help="text to calibrate on")
    parser.add_argument("--test", required=True, help="another text to measure on")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the test text")
    parser.add_argument("--span", type=int, help="stretch the test text over this many positions by gaps")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    adapter, tokenizer = load(arguments.model)
    prefix = torch.tensor(tokenizer("").input_ids, dtype=torch.long)
    ids = read_tokens(tokenizer, arguments.calibrate)
    positions = adapter.trained_positions
    blocks = make_blocks(ids, prefix, arguments.calibration_tokens, 4096, seed=0)
    collection = collect(adapter, blocks, positions, seed=0)
    test_ids = read_tokens(tokenizer, arguments.test)
    start = len(test_ids) // 3
    test_ids = torch.cat([prefix, test_ids[start : start + arguments.tokens - len(prefix)]])
    drawn = torch.Generator().manual_seed(0)
    places = spread_positions(len(test_ids), arguments.span or len(test_ids), drawn)
    samples = sample_layers(adapter, test_ids, places)
    result = {
        "tokens": arguments.tokens,
        "positions": int(places[-1]) + 1,
        "calibration": f"{arguments.calibration_tokens} tokens of {Path(arguments.calibrate).name}",
        "test": Path(arguments.test).name,
        "prediction recall by layer": [round(r, 3) for r in collection.mean_recalls()],
        **table(samples, collection.layer_moments(), own_maps(adapter, test_ids, samples)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} CPU",
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "labels.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results[arguments.name] = result
    file.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, RESULTS / "labels.png")


if __name__ == "__main__":
    main()
