"""Run a model over calibration text and see every layer's queries and keys after RoPE."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .adapter import AttentionCall, ModelAdapter
from .calibration_maps import LayerMoments
from .errors import UserError
from .kernels.prefill_attention import prefill_attention

Progress = Callable[[int, int], None]  # (layers x blocks done, layers x blocks in all)

SELECTED_SHARE = 16  # predictions are judged by the best N/16 keys, the paper's budget
SAMPLED_QUERIES = 8  # a block; spread over its second half, where N/16 is a real choice
MIN_RECALL = 0.5  # measured: layers that predict badly 0.13-0.29, the others 0.5-0.82 (SmolLM2-135M, tiny-256k)


@dataclass(frozen=True)
class Block:
    """Consecutive tokens [T] of the text and the position of the first."""

    token_ids: torch.Tensor
    position: int


@dataclass
class Collection:
    """What all blocks gave: moments of each layer, and recalls of its predicted selection by block."""

    moments: list[LayerMoments | None]
    recalls: list[list[float]] = field(default_factory=list)

    def layer_moments(self) -> list[LayerMoments]:
        """Moments of every layer; UserError when a layer showed none or the layers differ in shape."""
        seen = [moments for moments in self.moments if moments is not None]
        if len(seen) < len(self.moments):
            raise UserError("some layers of this model have no attention that can be seen; it is not supported")
        shapes = {(m.group, *m.key_sum.shape) for m in seen}
        if len(shapes) > 1:
            raise UserError(
                f"the layers of this model differ in heads or head_dim ({len(shapes)} shapes); it is not supported"
            )
        return seen

    def mean_recalls(self) -> list[float]:
        """Mean recall of each layer's predicted selection; 0 for layer 0, which nothing predicts."""
        return [sum(values) / len(values) if values else 0.0 for values in self.recalls]

    def unpredicted_layers(self) -> tuple[int, ...]:
        return tuple(i for i, recall in enumerate(self.mean_recalls()) if i == 0 or recall < MIN_RECALL)


def make_blocks(
    token_ids: torch.Tensor,
    prefix: torch.Tensor,
    tokens: int,
    block_tokens: int,
    max_positions: int,
    seed: int,
) -> list[Block]:
    """Cut about `tokens` of a text [n] into blocks spread over it, each after the tokenizer's prefix.

    Every second block starts at a random position up to max_positions: with
    rotary embeddings attention within a block stays the same, but queries and
    keys turn to where they lie in a long context.
    """
    tokens = min(tokens, len(token_ids))
    count = -(-tokens // block_tokens)
    length = tokens // count
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for index in range(count):
        stretch = len(token_ids) * index // count, len(token_ids) * (index + 1) // count
        spare = stretch[1] - stretch[0] - length
        start = stretch[0] + int(torch.randint(spare + 1, (1,), generator=generator))
        ids = torch.cat([prefix, token_ids[start : start + length]])
        furthest = max(0, max_positions - len(ids))
        far = int(torch.randint(furthest + 1, (1,), generator=generator))
        blocks.append(Block(ids, far if index % 2 else 0))
    return blocks


@torch.no_grad()
def collect(
    adapter: ModelAdapter, blocks: Sequence[Block], progress: Progress | None = None
) -> Collection:
    """Moments and prediction recalls of every layer over the blocks, all tokens counted."""
    layers = len(adapter.layers)
    result = Collection([None] * layers, [[] for _ in range(layers)])
    for number, block in enumerate(blocks):

        def seen(index: int, done: int = number * layers) -> None:
            if progress is not None:
                progress(done + index + 1, len(blocks) * layers)

        BlockRun(adapter, result, seen).run(block)
    return result


class BlockRun:
    """One forward pass over one block."""

    def __init__(self, adapter: ModelAdapter, result: Collection, seen: Callable[[int], None]) -> None:
        self.adapter, self.result, self.seen = adapter, result, seen
        self.hidden: torch.Tensor | None = None  # input of the layer before, [1, T, E]
        self.predicted: torch.Tensor | None = None  # this layer's predicted query at the sampled places

    def run(self, block: Block) -> None:
        device = self.adapter.device
        count = len(block.token_ids)
        half = count // 2
        self.places = torch.linspace(half, count - 1, min(SAMPLED_QUERIES, count - half)).long().to(device)
        positions = torch.arange(block.position, block.position + count, device=device)[None]
        handlers = [self._handler(index) for index in range(len(self.adapter.layers))]
        with self.adapter.handled_by(handlers), self.adapter.observed_by(self._predict):
            self.adapter.base(
                input_ids=block.token_ids[None].to(device), position_ids=positions, use_cache=False
            )

    def _predict(self, index: int, hidden: torch.Tensor, keywords: dict[str, Any]) -> None:
        """Before layer `index`: guess its query from the input of the layer before."""
        if self.hidden is not None:
            query, _ = self.adapter.predicted_query(index, self.hidden, keywords)
            self.predicted = query[0, :, self.places]  # [Hq, P, D]
        self.hidden = hidden

    def _handler(self, index: int) -> Callable[[AttentionCall], torch.Tensor]:
        def handle(call: AttentionCall) -> torch.Tensor:
            moments = LayerMoments.of(call.query[0], call.key[0])
            known = self.result.moments[index]
            if known is None:
                self.result.moments[index] = moments
            else:
                known.add(moments)
            if self.predicted is not None:
                recall = selection_recall(call, self.predicted, self.places)
                self.result.recalls[index].append(recall)
            self.seen(index)
            return attend(call)

        return handle


def attend(call: AttentionCall) -> torch.Tensor:
    """Causal attention over the block, [1, T, Hq, D]."""
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
    """Softmax mass summed over each group [Hkv, P, T] of queries [Hq, P, D] at places [P] over keys [Hkv, T, D]."""
    kv_heads, tokens, dim = keys.shape
    grouped = queries.float().reshape(kv_heads, -1, dim)  # [Hkv, G P, D]
    logits = (grouped @ keys.mT * scale).view(kv_heads, -1, len(places), tokens)  # [Hkv, G, P, T]
    token = torch.arange(tokens, device=keys.device)
    hidden = token > places[:, None]  # [P, T]
    if window:
        hidden |= token <= places[:, None] - window
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).sum(1)
