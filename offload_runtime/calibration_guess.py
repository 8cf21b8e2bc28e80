"""What a layer changes in the next one's normalised input, guessed from that input: predictions start there.

The best affine guess by least squares over a text's tokens, of low rank (reduced-rank regression). What is
kept is what matters most to the query that the layer's projection makes. Recall of the best N/16 keys,
SmolLM2-135M on another text (bench/results/prediction_smollm2.json): 0.824 without, 0.904 with it.

A layer gets a guess when a block that the guess was not made from is better selected with it than without.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from .adapter import AttentionCall, ModelAdapter
from .calibration import Calibration
from .calibration_collect import MIN_RECALL, attend, selection_recall
from .calibration_shift import SKIPPED_TOKENS
from .input_guess import Guesses, InputCorrection, Parts, guess_rank
from .products import query_projection

RIDGE = 1e-3  # of the mean square of the input; 8 x 4,096 tokens fit 576 inputs and more
# Of a subspace of twice the rank: a direction is found to (its 2 R-th eigenvalue / its own)^4.
ITERATIONS = 4
SAMPLED = 48  # queries that judge, spread over the last quarter of a block
MOMENT_BYTES = 8 << 30  # of host memory: the 8B shape takes 4.3 GB, larger models take turns of layers

Observer = Callable[[int, torch.Tensor, torch.Tensor, dict[str, Any]], None]
CallHandler = Callable[[int, AttentionCall], None]


@dataclass
class Regression:
    """Moments over tokens of a layer's normalised predicted input and of what is missing from it."""

    inputs: torch.Tensor  # [E + 1, E + 1] float32, host: input and a 1, squared
    products: torch.Tensor  # [E + 1, E]: with what is missing

    @classmethod
    def of(cls, known: torch.Tensor, true: torch.Tensor) -> "Regression":
        """From the inputs predicted from and the true ones, [T, E]; a text's first tokens are left out."""
        known, true = known[SKIPPED_TOKENS:].float(), true[SKIPPED_TOKENS:].float()
        with_one = torch.cat([known, torch.ones_like(known[:, :1])], 1)  # [T, E + 1]
        return cls((with_one.T @ with_one).cpu(), (with_one.T @ (true - known)).cpu())

    def add(self, other: "Regression") -> None:
        self.inputs += other.inputs
        self.products += other.products

    def solve(self, rank: int, metric: torch.Tensor, device: torch.device) -> Parts:
        """The guess of that rank whose error is least in the metric [E, E], which is positive definite."""
        inputs, products = self.inputs.to(device).double(), self.products.to(device).double()
        tokens, mean = inputs[-1, -1], inputs[-1, :-1] / inputs[-1, -1]
        spread = inputs[:-1, :-1] / tokens - mean[:, None] * mean
        inputs.diagonal()[:-1] += RIDGE * inputs.diagonal()[:-1].mean()
        solved = torch.linalg.solve(inputs, products)
        matrix, offset = solved[:-1], solved[-1]  # [E, E], [E]
        root = torch.linalg.cholesky(metric.to(device).double())
        weighed = matrix @ root  # the guess as the metric sees it
        kept = top_directions(weighed.T @ spread @ weighed, rank)  # [E, R]
        down = (weighed @ kept).T  # [R, E]
        up = torch.linalg.solve_triangular(root, kept.T, upper=False, left=False).T  # [E, R]
        offset = offset + mean @ (matrix - (up @ down).T)
        return offset.float().cpu(), down.float().cpu(), up.float().cpu()


def top_directions(square: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors [E, R] of the largest eigenvalues of a positive [E, E], by subspace iteration."""
    width = len(square)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(width, 2 * rank), generator=draw, dtype=square.dtype)
    basis = torch.linalg.qr(start.to(square.device)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(square @ basis).Q
    _, turns = torch.linalg.eigh(basis.T @ square @ basis)  # ascending
    return basis @ turns[:, -rank:]


def query_metric(adapter: ModelAdapter, index: int, width: int) -> torch.Tensor:
    """How much an error of the normalised input [E, E] matters to layer `index`'s query.

    The identity where the projection is not a plain linear layer: packed, or fused with that of keys.
    """
    projection = query_projection(adapter.attentions[index])
    if projection is None:
        return torch.eye(width)
    wide = projection.weight.detach().float()  # [Hq D, E]
    square = wide.T @ wide
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    return square


@torch.no_grad()
def watch(adapter: ModelAdapter, ids: torch.Tensor, observe: Observer, handle: CallHandler) -> None:
    """Dense attention over ids [T]; observe(layer, its input, that of the one before [T, E], keywords)."""
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


def measure_recalls(
    adapter: ModelAdapter,
    ids: torch.Tensor,
    corrections: Mapping[str, InputCorrection],
    seen: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, float]]:
    """By layer and correction, the recall of predictions on ids [T]; seen() after each layer."""
    places = torch.linspace(len(ids) * 3 // 4, len(ids) - 1, SAMPLED).long().to(adapter.device)
    asked: dict[int, dict[str, torch.Tensor]] = {}
    recalls: dict[int, dict[str, float]] = {}

    def observe(index: int, _: torch.Tensor, before: torch.Tensor, keywords: dict[str, Any]) -> None:
        asked[index] = {}
        for name, correction in corrections.items():
            query, _scale = adapter.predicted_query(index, before[None], keywords, correction)
            asked[index][name] = query[0, :, places]  # [Hq, P, D]

    def handle(index: int, call: AttentionCall) -> None:
        seen()
        if index in asked:
            found = asked.pop(index).items()
            recalls[index] = {name: selection_recall(call, query, places) for name, query in found}

    watch(adapter, ids, observe, handle)
    return recalls


def add_layer(
    sums: dict[int, Regression],
    adapter: ModelAdapter,
    index: int,
    before: torch.Tensor,
    hidden: torch.Tensor,
) -> None:
    """Add the moments of layer `index`, from the input of the one before and its own, [T, E]."""
    found = Regression.of(adapter.normed_input(index, before), adapter.normed_input(index, hidden))
    if index in sums:
        sums[index].add(found)
    else:
        sums[index] = found


def regressions(
    adapter: ModelAdapter, blocks: Sequence[torch.Tensor], layers: Sequence[int], seen: Callable[[], None]
) -> dict[int, Regression]:
    """Of those layers, over blocks [T]; seen() after each layer of each block."""
    sums: dict[int, Regression] = {}

    def observe(index: int, hidden: torch.Tensor, before: torch.Tensor, _: dict[str, Any]) -> None:
        if index in layers:
            add_layer(sums, adapter, index, before, hidden)

    for block in blocks:
        watch(adapter, block, observe, lambda *_: seen())
    return sums


def solve_all(adapter: ModelAdapter, sums: Mapping[int, Regression], rank: int) -> dict[int, Parts]:
    """Every layer's guess of that rank."""
    width = adapter.shape.hidden
    return {
        index: found.solve(rank, query_metric(adapter, index, width), adapter.device)
        for index, found in sums.items()
    }


def turns_of(layers: int, width: int) -> list[range]:
    """The layers but the first in turns whose moments fit MOMENT_BYTES."""
    at_once = max(1, MOMENT_BYTES // (8 * (width + 1) ** 2))  # two float32 matrices
    return [range(first, min(layers, first + at_once)) for first in range(1, layers, at_once)]


def guess_units(adapter: ModelAdapter, blocks: int) -> int:
    """How far with_guesses() counts."""
    layers = len(adapter.layers)
    return 0 if blocks < 2 else layers * (len(turns_of(layers, adapter.shape.hidden)) * (blocks - 1) + 1)


def with_guesses(
    made: Calibration,
    adapter: ModelAdapter,
    blocks: Sequence[torch.Tensor],
    progress: Callable[[int], None],
) -> Calibration:
    """The calibration with guesses for the layers that they help, made from all blocks [T] but the last, by
    which they are judged. As it was when there is only one block. progress(layers x blocks done).
    """
    if len(blocks) < 2:
        return made
    done = count(1)

    def seen() -> None:
        progress(next(done))

    layers, width = len(adapter.layers), adapter.shape.hidden
    parts: dict[int, Parts] = {}
    for turn in turns_of(layers, width):
        parts |= solve_all(adapter, regressions(adapter, blocks[:-1], turn, seen), guess_rank(width))
    guesses = stacked(parts, layers)
    corrections = {
        "plain": InputCorrection(made.input_shift, None, adapter.dtype, adapter.device),
        "guess": InputCorrection(None, guesses, adapter.dtype, adapter.device),
    }
    return keep_better(made, guesses, measure_recalls(adapter, blocks[-1], corrections, seen))


def stacked(parts: dict[int, Parts], layers: int) -> Guesses:
    """Zero for layers without."""
    like = next(iter(parts.values()))
    none = tuple(torch.zeros_like(part) for part in like)
    rows = [parts.get(index, none) for index in range(layers)]
    return Guesses(*(torch.stack(part) for part in zip(*rows, strict=True)))


def keep_better(made: Calibration, guesses: Guesses, recalls: dict[int, dict[str, float]]) -> Calibration:
    """The calibration with the guesses of the layers whose recall is better with it; their shifts go."""
    kept = torch.zeros(len(guesses.up), dtype=torch.bool)
    for index, recall in recalls.items():
        kept[index] = recall["guess"] > recall["plain"]
    if not kept.any():
        return made
    chosen = Guesses(*(part * kept.view(-1, *[1] * (part.dim() - 1)) for part in guesses.parts))
    shift = None if made.input_shift is None else made.input_shift * ~kept[:, None]
    poor = [i for i in made.unpredicted_layers if not kept[i] or recalls[i]["guess"] < MIN_RECALL]
    known = made.provenance["prediction_recall"].split(",")
    texts = [f"{recalls[i]['guess']:.3f}" if kept[i] else text for i, text in enumerate(known)]
    return replace(
        made,
        guesses=chosen,
        input_shift=shift if shift is not None and shift.any() else None,
        unpredicted_layers=tuple(poor),
        provenance={**made.provenance, "prediction_recall": ",".join(texts)},
    )
