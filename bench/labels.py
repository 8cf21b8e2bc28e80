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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.calibration_collect import attend, collect, make_blocks
from offload_runtime.calibration_maps import LayerMoments, calibrate_layer, label_maps, spread
from offload_runtime.kernels.labels import code_width, make_labels_reference, read_labels
from offload_runtime.kernels.query_labels import query_labels_reference
from offload_runtime.kernels.scores import label_scores_reference

RESULTS = Path(__file__).parent / "results"
SINKS, RECENT, SHARE = 16, 64, 16  # the runtime's defaults
QUERIES = 32  # sampled positions a layer

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query_map, key_map, key_mean of a layer


@dataclass
class LayerSample:
    """One layer's all_queries [Hq, T, D] and keys [Hkv, T, D]; sampled are the queries at lengths [P] - 1.

    From them: queries [P, Hq, D], attention [P, Hq, T] and lse [P, Hq] over all keys.
    """

    all_queries: torch.Tensor
    keys: torch.Tensor
    lengths: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        self.queries = self.all_queries[:, self.lengths.long() - 1].transpose(0, 1).contiguous()
        group = self.queries.shape[1] // self.keys.shape[0]
        logits = (
            torch.einsum("phd,htd->pht", self.queries, self.keys.repeat_interleave(group, 0)) * self.scale
        )
        hidden = torch.arange(self.keys.shape[1]) >= self.lengths[:, None]
        logits.masked_fill_(hidden[:, None], float("-inf"))
        self.lse = logits.logsumexp(-1)
        self.attention = logits.softmax(-1)


@torch.no_grad()
def sample_layers(
    adapter: ModelAdapter, token_ids: torch.Tensor, positions: torch.Tensor
) -> list[LayerSample]:
    """Run a held-out text [T] at positions [T] and keep what decoding its last quarter would look up."""
    tokens = len(token_ids)
    places = torch.linspace(tokens * 3 // 4, tokens - 1, QUERIES).long()
    samples: list[LayerSample] = []

    def handle(call: AttentionCall) -> torch.Tensor:
        samples.append(LayerSample(call.query[0].float(), call.key[0].float(), places.int() + 1, call.scale))
        return attend(call)

    with adapter.handled_by([handle] * len(adapter.layers)):
        adapter.base(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
    return samples


def label_cache(keys: torch.Tensor, maps: Maps, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [1, Hkv, T, width] and scales [1, Hkv, T, 2] of keys [Hkv, T, D]; bits 32: not rounded."""
    kv_heads, tokens, _ = keys.shape
    kind = {32: torch.float32, 16: torch.float16}.get(bits, torch.uint8)
    codes = torch.zeros(1, kv_heads, tokens, code_width(maps[1].shape[1], bits), dtype=kind)
    scales = torch.zeros(1, kv_heads, tokens, 2, dtype=torch.float16)
    start = torch.zeros(1, dtype=torch.int32)
    make_labels_reference(keys[None], maps[1], maps[2], start, codes, scales, min(bits, 16))
    return codes, scales


def local_rows(sample: LayerSample) -> torch.Tensor:
    """Sinks and the recent ring of every query as slots [P, Hkv, SINKS + RECENT, 2 D]; values are zero."""
    kv_heads, _, dim = sample.keys.shape
    slots = torch.zeros(len(sample.lengths), kv_heads, SINKS + RECENT, 2 * dim)
    slots[:, :, :SINKS, :dim] = sample.keys[:, :SINKS]
    for p, length in enumerate(sample.lengths.tolist()):
        recent = torch.arange(length - RECENT, length)
        slots[p, :, SINKS + recent % RECENT, :dim] = sample.keys[:, recent]
    return slots


def scores_of(sample: LayerSample, maps: Maps, bits: int, combination: str) -> torch.Tensor:
    """Label scores [P, Hkv, T] of every query, the group's heads combined."""
    queries, kv_heads = sample.queries, sample.keys.shape[0]
    labels, local = query_labels_reference(
        queries, maps[0], maps[2], local_rows(sample), sample.lengths, SINKS, RECENT, sample.scale, True
    )
    codes, scales = (t.expand(len(queries), -1, -1, -1) for t in label_cache(sample.keys, maps, bits))
    scores = torch.empty(len(queries), kv_heads, sample.keys.shape[1])
    # q.mean is in neither the labels nor the offsets of the runtime; [P, Hkv, G]
    grouped = queries.view(len(queries), kv_heads, -1, queries.shape[-1]) * sample.scale
    mean_logit = torch.einsum("phgd,hd->phg", grouped, maps[2])
    full = sample.lse - mean_logit.flatten(1)
    if combination in ("sum, full normaliser", "sum, local normaliser"):
        offsets = full if "full" in combination else local
        label_scores_reference(
            labels, offsets, codes, scales, min(bits, 16), sample.lengths, SINKS, RECENT, scores
        )
        return scores
    per_head = torch.einsum(
        "phgr,htr->phgt", labels.unflatten(1, (kv_heads, -1)), read_labels(codes[0], scales[0], min(bits, 16))
    )
    if combination == "max, local normaliser":
        return (per_head - local.unflatten(1, (kv_heads, -1))[..., None]).amax(2)
    raw = per_head + mean_logit[..., None]
    return raw.amax(2) if combination == "max of logits" else raw.mean(2)


def found(sample: LayerSample, scores: torch.Tensor) -> tuple[float, float]:
    """(mass, far) of the best N/16 selectable keys by scores [P, Hkv, T]."""
    masses, fars = [], []
    group = sample.queries.shape[1] // sample.keys.shape[0]
    for p, length in enumerate(sample.lengths.tolist()):
        far = slice(SINKS, length - RECENT)
        chosen = scores[p, :, far].topk(length // SHARE).indices.repeat_interleave(group, 0)  # [Hq, K]
        attention = sample.attention[p, :, far]  # [Hq, selectable]
        selected = attention.gather(1, chosen).sum(1)
        masses.append((1 - attention.sum(1) + selected).mean())
        fars.append((selected.sum() / attention.sum()))
    return float(torch.stack(masses).mean()), float(torch.stack(fars).mean())


def measure(samples: list[LayerSample], maps: list[Maps], bits: int, combination: str) -> dict[str, float]:
    pairs = [
        found(sample, scores_of(sample, layer, bits, combination))
        for sample, layer in zip(samples, maps, strict=True)
    ]
    mass, far = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {"mass": round(mass, 4), "far": round(far, 4)}


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


def label_bytes(channels: int, bits: int) -> int:
    """Bytes a key, the (scale, offset) pair of float16 included."""
    return channels * bits // 8 + (4 if bits < 16 else 0)


COMBINATIONS = (
    "sum, full normaliser",
    "sum, local normaliser",
    "max, local normaliser",
    "max of logits",
    "mean of logits",
)
LABELS = (
    *(("channels", r, 16) for r in (8, 16, 32)),
    *(("projection", r, bits) for r in (16, 32, 64) for bits in (16, 8, 4)),
)


def table(
    samples: list[LayerSample], moments: list[LayerMoments], own: dict[tuple[int, str], list[Maps]]
) -> dict[str, Any]:
    """All measurements of one model."""
    runtime = "sum, local normaliser"
    exact = [identity_maps(sample) for sample in samples]
    projected = {r: [m.maps(r, "projection") for m in moments] for r in (16, 32, 64)}
    rows: list[dict[str, Any]] = []
    for method, channels, bits in LABELS:
        maps = projected[channels] if method == "projection" else [m.maps(channels, method) for m in moments]
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
            f"{tokens} tokens, {how}": measure(samples, maps, 4, runtime) for (tokens, how), maps in own.items()
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


def spread_positions(tokens: int, span: int) -> torch.Tensor:
    """Positions [tokens] that reach `span` by gaps of random size between stretches of 512 tokens."""
    stretch = torch.arange(tokens) // 512
    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(int(stretch[-1]) + 1, generator=generator).cumsum(0)
    return torch.arange(tokens) + ((ends - ends[0]) / (ends[-1] - ends[0]) * (span - tokens))[stretch].long()


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
    """Lost mass over bytes a key, one panel a model."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(6 * len(results), 4.2), squeeze=False)
    for panel, (name, result) in zip(panels[0], results.items(), strict=True):
        for method, bits, mark in (
            ("channels", 16, "s"), ("projection", 16, "o"), ("projection", 8, "^"), ("projection", 4, "D")
        ):  # fmt: skip
            rows = [r for r in result["labels"] if (r["method"], r["bits"]) == (method, bits)]
            panel.plot(
                [r["bytes"] for r in rows],
                [r["mass"] for r in rows],
                mark + "-",
                label=f"{method}, {bits} bit",
            )
            for row in rows:
                panel.annotate(
                    row["channels"],
                    (row["bytes"], row["mass"]),
                    (3, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        panel.axhline(result["exact"]["mass"], color="grey", ls="--", label="exact scores")
        panel.set(
            xscale="log",
            xlabel="label bytes a key",
            ylabel="attention mass found",
            title=f"{name}: N {result['tokens']:,}, {result['positions']:,} positions",
        )
        panel.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        panel.legend(fontsize=8)
    figure.suptitle("One selection of N/16 keys per KV head; numbers are R")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    places = spread_positions(len(test_ids), arguments.span or len(test_ids))
    samples = sample_layers(adapter, test_ids, places)
    result = {
        "tokens": arguments.tokens,
        "positions": int(places[-1]) + 1,
        "calibration": f"{arguments.calibration_tokens} tokens of {Path(arguments.calibrate).name}",
        "test": Path(arguments.test).name,
        "prediction recall by layer": [round(r, 3) for r in collection.mean_recalls()],
        **table(samples, collection.layer_moments(), own_maps(adapter, test_ids, samples)),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()} CPU",
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "labels.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results[arguments.name] = result
    file.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, RESULTS / "labels.png")


if __name__ == "__main__":
    main()
