"""How much attention mass a set of labels finds, on the queries and keys of a held-out text."""

from dataclasses import dataclass

import torch

from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.calibration_collect import attend
from offload_runtime.calibration_mass import RECENT, SINKS
from offload_runtime.kernels.labels import code_width, make_labels_reference, read_labels
from offload_runtime.kernels.query_labels import query_labels_reference
from offload_runtime.kernels.scores import label_scores_reference

SHARE = 16  # N/16, the runtime's default
QUERIES = 32  # sampled positions a layer
POPCOUNT = -1  # in place of bits: signs of both query and key, one scale a head; what popcount compares
COMBINATIONS = (
    "sum, full normaliser",
    "sum, local normaliser",
    "max, local normaliser",
    "max of logits",
    "mean of logits",
)

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
        keys = self.keys.repeat_interleave(group, 0)  # [Hq, T, D]
        logits = torch.einsum("phd,htd->pht", self.queries, keys) * self.scale
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
    """Codes [1, Hkv, T, width] and scales [1, Hkv, T, 2] of keys [Hkv, T, D]; bits 32: not rounded.

    bits 2 are kept one a byte here, bits 1 as the numbers that a sign and a scale stand for.
    """
    if bits == 1:
        labels = label_cache(keys, maps, 32)[0]
        return signs(labels, labels.abs().mean(-1, keepdim=True).half().float()), torch.empty(1, 1, 1, 1)
    kv_heads, tokens, _ = keys.shape
    kind = {32: torch.float32, 16: torch.float16}.get(bits, torch.uint8)
    codes = torch.zeros(1, kv_heads, tokens, code_width(maps[1].shape[1], bits), dtype=kind)
    scales = torch.zeros(1, kv_heads, tokens, 2, dtype=torch.float16)
    start = torch.zeros(1, dtype=torch.int32)
    make_labels_reference(keys[None], maps[1], maps[2], start, codes, scales, min(bits, 16))
    return codes, scales


def signs(labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Labels [..., R] as their signs times a scale; the mean size is the scale of the least square error."""
    return torch.where(labels >= 0, scale, -scale)


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
    if bits == POPCOUNT:
        labels = signs(labels, labels.abs().mean(-1, keepdim=True))
        whole = label_cache(sample.keys, maps, 32)[0]
        cached = (signs(whole, whole.abs().mean((2, 3), keepdim=True)), torch.empty(1, 1, 1, 1))
    else:
        cached = label_cache(sample.keys, maps, bits)
    codes, scales = (t.expand(len(queries), -1, -1, -1) for t in cached)
    bits = 16 if bits in (1, POPCOUNT) else bits
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
        fars.append(selected.sum() / attention.sum())
    return float(torch.stack(masses).mean()), float(torch.stack(fars).mean())


def measure(samples: list[LayerSample], maps: list[Maps], bits: int, combination: str) -> dict[str, float]:
    pairs = [
        found(sample, scores_of(sample, layer, bits, combination))
        for sample, layer in zip(samples, maps, strict=True)
    ]
    mass, far = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return {"mass": round(mass, 4), "far": round(far, 4)}
