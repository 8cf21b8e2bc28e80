"""Run a model over calibration text and see every layer's queries and keys after RoPE.

A text of a few thousand tokens shows the slow RoPE channels at a few angles only,
and a projection made from those misses what keys look like elsewhere. So each block runs as a
batch of two: row 0 is the text at its own positions; row 1 is given row 0's hidden
states before every layer, but positions drawn from the whole range of the model.
Moments come from row 1: the same contents, turned to every place they may have.
With RoPE that is fair: where a key stands changes its angles, not its contents.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from .adapter import AttentionCall, ModelAdapter
from .calibration import Calibration, config_facts, config_hash
from .calibration_maps import LayerMoments, check_request, maps_of_layers
from .calibration_mass import MassCurve, MassSums, query_places
from .calibration_shift import ShiftSums
from .errors import UserError
from .kernels.prefill_attention import prefill_attention

Progress = Callable[[int, int], None]  # (layers x blocks done, layers x blocks in all)

SELECTED_SHARE = 16  # predictions are judged by the best N/16 keys, the paper's budget
SAMPLED_QUERIES = 8  # a block; spread over its second half, where N/16 is a real choice
PROMPT_TOKENS = 1024  # of a prompt when there is no file; 4,096 gain under 0.004 (bench/results/labels.json)
# Measured on SmolLM2-135M and tiny-256k: the first layers reach 0.14 to 0.44, all others 0.7 to 0.9. Below a
# half a prediction fetches mostly in vain, and is shifted (calibration_shift.py) or not made.
MIN_RECALL = 0.5


@dataclass
class Collection:
    """What all blocks gave, by layer: moments, recalls of the predicted selection, held mass, shifts.

    recalls: of predictions from the layer before's input by block; shifted_recalls: the same with the
    mean of what that layer adds.
    """

    moments: list[LayerMoments | None]
    recalls: list[list[float]] = field(default_factory=list)
    mass: list[MassSums | None] = field(default_factory=list)
    shifts: ShiftSums = field(default_factory=ShiftSums)
    shifted_recalls: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, layers: int) -> "Collection":
        """Nothing seen yet."""
        recalls: list[list[float]] = [[] for _ in range(layers)]
        shifted: list[list[float]] = [[] for _ in range(layers)]
        return cls([None] * layers, recalls, [None] * layers, shifted_recalls=shifted)

    def layer_moments(self) -> list[LayerMoments]:
        """Moments of every layer; UserError when a layer showed none or the layers differ in shape."""
        seen = [moments for moments in self.moments if moments is not None]
        if len(seen) < len(self.moments):
            raise UserError("this model is not supported: some of its layers have no visible attention")
        shapes = {(m.group, *m.key_sum.shape) for m in seen}
        if len(shapes) > 1:
            raise UserError(
                f"this model is not supported: its layers differ in heads or head_dim ({len(shapes)} shapes)"
            )
        return seen

    def mass_curve(self) -> MassCurve | None:
        """Mass held by budgets; None when the blocks were too short to tell."""
        sums = [mass for mass in self.mass if mass is not None]
        return MassCurve.of(sums) if sums and len(sums) == len(self.mass) else None

    def shifted(self) -> list[bool]:
        """Layers that predict badly from the input as it is and better from the shifted one."""
        pairs = zip(self.recalls, self.shifted_recalls or self.recalls, strict=True)
        return [mean(plain) < MIN_RECALL and mean(shifted) > mean(plain) for plain, shifted in pairs]

    def mean_recalls(self) -> list[float]:
        """Mean recall of each layer's predicted selection; 0 for layer 0, which nothing predicts."""
        pairs = zip(self.shifted(), self.recalls, self.shifted_recalls or self.recalls, strict=True)
        return [mean(shifted if kept else plain) for kept, plain, shifted in pairs]

    def unpredicted_layers(self) -> tuple[int, ...]:
        return tuple(i for i, recall in enumerate(self.mean_recalls()) if i == 0 or recall < MIN_RECALL)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def make_blocks(
    token_ids: torch.Tensor, prefix: torch.Tensor, tokens: int, block_tokens: int, seed: int
) -> list[torch.Tensor]:
    """Cut about `tokens` of a text [n] into blocks [T] spread over it, each after the tokenizer's prefix."""
    tokens = min(tokens, len(token_ids))
    count = -(-tokens // block_tokens)
    length = tokens // count
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for index in range(count):
        first, end = (len(token_ids) * edge // count for edge in (index, index + 1))
        start = first + int(torch.randint(end - first - length + 1, (1,), generator=generator))
        blocks.append(torch.cat([prefix, token_ids[start : start + length]]))
    return blocks


@torch.no_grad()
def collect(
    adapter: ModelAdapter,
    blocks: Sequence[torch.Tensor],
    positions: int,
    seed: int,
    progress: Progress | None = None,
    known: tuple[Collection, int] | None = None,
    keep: Callable[[Collection, int], None] | None = None,
) -> Collection:
    """Moments over all tokens of the blocks [T], turned to places below `positions`, recalls, held mass.

    known: what the first so many blocks gave, to go on from. keep(collection, blocks
    done) is called after every block.
    """
    layers = len(adapter.layers)
    result, skipped = known or (Collection.of(layers), 0)
    generator = torch.Generator().manual_seed(seed)
    for number, block in enumerate(blocks):

        def seen(index: int, done: int = number * layers) -> None:
            if progress is not None:
                progress(done + index + 1, len(blocks) * layers)

        places = torch.randint(max(positions, len(block)), (len(block),), generator=generator)
        if number < skipped:
            continue  # its places were drawn all the same: the next block's must not change
        BlockRun(adapter, result, seen).run(block, places)
        if keep is not None:
            keep(result, number + 1)
    return result


class BlockRun:
    """One forward pass over one block."""

    def __init__(self, adapter: ModelAdapter, result: Collection, seen: Callable[[int], None]) -> None:
        self.adapter, self.result, self.seen = adapter, result, seen
        self.hidden: torch.Tensor | None = None  # input of the layer before, [2, T, E]
        # This layer's predicted queries [Hq, P, D] at the sampled tokens, plain and shifted.
        self.predicted: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, block: torch.Tensor, turned: torch.Tensor) -> None:
        """block [T]: token ids; turned [T]: the positions that row 1 puts them at."""
        device, count = self.adapter.device, len(block)
        half = count // 2
        self.sampled = torch.linspace(half, count - 1, min(SAMPLED_QUERIES, count - half)).long().to(device)
        asked, self.contexts = query_places(count)
        self.asked, self.asked_places = asked.to(device), asked.tolist()
        positions = torch.stack([torch.arange(count), turned]).to(device)  # [2, T]
        handlers = [self._handler(index) for index in range(len(self.adapter.layers))]
        with self.adapter.handled_by(handlers), self.adapter.observed_by(self._before_layer):
            self.adapter.base(
                input_ids=block.to(device).expand(2, -1), position_ids=positions, use_cache=False
            )

    def _before_layer(self, index: int, hidden: torch.Tensor, keywords: dict[str, Any]) -> None:
        """Give row 1 the hidden states of row 0; guess this layer's query from the layer before's input."""
        hidden[1] = hidden[0]
        if self.hidden is not None:
            self.result.shifts.add(index, hidden[0], self.hidden[0])
            shift = self.result.shifts.mean(index).to(hidden.dtype)  # of the blocks so far
            plain, _ = self.adapter.predicted_query(index, self.hidden, keywords)
            shifted, _ = self.adapter.predicted_query(index, self.hidden + shift, keywords)
            self.predicted = plain[0, :, self.sampled], shifted[0, :, self.sampled]
        self.hidden = hidden

    def _handler(self, index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            moments = LayerMoments.of(call.query[1], call.key[1])
            known = self.result.moments[index]
            if known is None:
                self.result.moments[index] = moments
            else:
                known.add(moments)
            text = replace(call, query=call.query[:1], key=call.key[:1], value=call.value[:1])
            if self.predicted is not None:
                plain, shifted = (selection_recall(text, guess, self.sampled) for guess in self.predicted)
                self.result.recalls[index].append(plain)
                self.result.shifted_recalls[index].append(shifted)
            self._add_mass(index, text)
            self.seen(index)
            out = attend(text)  # [1, T, Hq, D]
            return torch.cat([out, torch.zeros_like(out)])

        return handle

    def _add_mass(self, index: int, text: AttentionCall) -> None:
        """What budgets would hold of this layer's attention, at the contexts that the block reaches."""
        sums = self.result.mass[index] or MassSums(text.key.shape[1])
        self.result.mass[index] = sums
        if self.contexts:
            queries, group = text.query[0, :, self.asked], text.query.shape[1] // text.key.shape[1]
            masses = group_masses(queries, text.key[0].float(), self.asked, text.scale, text.window)
            sums.add(masses / group, self.asked_places, self.contexts)


def attend(call: AttentionCall) -> torch.Tensor:
    """Causal attention over a whole text, [1, T, Hq, D]."""
    if call.window or call.softcap or call.sink_logits is not None:
        rows = torch.cat([call.key[0], call.value[0]], -1)  # [Hkv, T, 2 D]
        query = call.query.contiguous()
        return prefill_attention(query, rows, call.scale, call.window, call.softcap, call.sink_logits)
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (rows.repeat_interleave(group, 1) for rows in (call.key, call.value))  # [1, Hq, T, D]
    out = F.scaled_dot_product_attention(call.query, key, value, is_causal=True, scale=call.scale)
    return out.transpose(1, 2)


def selection_recall(call: AttentionCall, predicted: torch.Tensor, places: torch.Tensor) -> float:
    """Mean part of the true queries' best N/16 keys that predicted queries [Hq, P, D] select too."""
    keys = call.key[0].float()  # [Hkv, T, D]
    true_masses = group_masses(call.query[0, :, places], keys, places, call.scale, call.window)
    guess_masses = group_masses(predicted, keys, places, call.scale, call.window)
    recalls = []
    for number, place in enumerate(places.tolist()):
        visible = min(place + 1, call.window or place + 1)
        budget = max(1, visible // SELECTED_SHARE)
        chosen = torch.zeros_like(true_masses[:, number], dtype=torch.bool)  # [Hkv, T]
        chosen.scatter_(-1, true_masses[:, number].topk(budget).indices, True)
        guessed = guess_masses[:, number].topk(budget).indices
        recalls.append(chosen.gather(-1, guessed).float().mean())
    return float(torch.stack(recalls).mean())


def group_masses(
    queries: torch.Tensor, keys: torch.Tensor, places: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Softmax mass [Hkv, P, T] summed over the group; queries [Hq, P, D] at places [P], keys [Hkv, T, D]."""
    logits = grouped_products(queries.float(), keys) * scale  # [Hkv, G, P, T]
    token = torch.arange(keys.shape[1], device=keys.device)
    hidden = token > places[:, None]  # [P, T]
    if window:
        hidden |= token <= places[:, None] - window
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1)


def grouped_products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products [Hkv, G, P, T] of queries [Hq, P, N] and their groups' keys [Hkv, T, N]."""
    _, count, width = queries.shape
    flat = queries.reshape(len(keys), -1, width)  # [Hkv, G P, N]
    return (flat @ keys.mT).view(len(keys), -1, count, keys.shape[1])


def make_calibration(
    adapter: ModelAdapter, collection: Collection, channels: int, method: str, facts: dict[str, str]
) -> Calibration:
    """The calibration that a collection gives; facts are added to its provenance."""
    check_request(channels, method, adapter.head_dim)
    maps = maps_of_layers(collection.layer_moments(), channels, method)
    query_map, key_map, key_mean = (torch.stack(parts) for parts in zip(*maps, strict=True))
    provenance = {
        **provenance_of(adapter.model.config, method, channels),
        "prediction_recall": ",".join(f"{recall:.3f}" for recall in collection.mean_recalls()),
        **facts,
    }
    layers, curve = collection.unpredicted_layers(), collection.mass_curve()
    shift = collection.shifts.means(collection.shifted())
    return Calibration(query_map, key_map, key_mean, layers, provenance, curve, shift)


def provenance_of(config: Any, method: str, channels: int) -> dict[str, str]:
    """What every calibration says of itself."""
    return {
        "config": json.dumps(config_facts(config)),
        "config_hash": config_hash(config),
        "method": method,
        "label_channels": str(channels),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def calibrate_prompt(
    adapter: ModelAdapter, token_ids: torch.Tensor, channels: int, positions: int, seed: int = 0
) -> Calibration:
    """The projection for a model without a file, from the first tokens [T] of a prompt.

    positions: as far as the sequence may grow. Measured (bench/results/labels.json): from
    1,024 tokens it finds 0.87 of the far mass on tiny-256k and 0.76 on SmolLM2-135M, as a
    file does; the same tokens' moments at their own places find 0.40 and 0.56.
    """
    collection = collect(adapter, [token_ids[:PROMPT_TOKENS]], positions, seed)
    facts = {"model": "the model of this prompt", "tokens": str(min(len(token_ids), PROMPT_TOKENS))}
    return make_calibration(adapter, collection, channels, "projection", facts)
