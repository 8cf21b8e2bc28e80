"""How many tokens each KV head has to select to hold a stated share of the attention mass.

Measured at calibration with exact scores, kept in the calibration file, and read
by `budget_mass`: every KV head of every layer gets the budget that its own curve asks for.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from .config import RuntimeConfig

CONTEXTS = tuple(2**power for power in range(8, 19))  # 256 to 262,144 tokens; a block shows those it reaches
BUDGETS = tuple(2**power for power in range(19))  # 1 to 262,144 selected tokens
QUERIES = 4  # a context and block, the last sixteenth before it: within 6% of its length
SINKS, RECENT = RuntimeConfig.sinks, RuntimeConfig.recent  # held anyway: not counted as selected
TREND_POINTS = 3  # contexts that a head's growth beyond the longest one is read from


class MassSums:
    """Sums over queries of the mass [Hkv, contexts, budgets] that budgets hold, and the queries' number."""

    def __init__(self, kv_heads: int) -> None:
        self.held = torch.zeros(kv_heads, len(CONTEXTS), len(BUDGETS), dtype=torch.float64)
        self.queries = torch.zeros(len(CONTEXTS), dtype=torch.int64)

    def add(self, masses: torch.Tensor, places: list[int], contexts: list[int]) -> None:
        """masses [Hkv, P, T]: softmax of the queries at places [P], group mean; contexts [P] by index."""
        held = [held_by_budgets(masses[:, p, : place + 1]) for p, place in enumerate(places)]
        on_host = torch.stack(held).double().cpu()  # [P, Hkv, budgets], one wait for the GPU
        for one, context in zip(on_host, contexts, strict=True):
            self.held[:, context] += one
            self.queries[context] += 1


def held_by_budgets(mass: torch.Tensor) -> torch.Tensor:
    """Mass [Hkv, budgets] on sinks, recent and best other tokens, from one query's mass [Hkv, T]."""
    far = mass[:, SINKS : mass.shape[1] - RECENT].sort(-1, descending=True).values.cumsum(-1)  # [Hkv, T']
    last = torch.tensor([min(budget, far.shape[1]) - 1 for budget in BUDGETS], device=mass.device)
    return mass.sum(-1, keepdim=True) - far[:, -1:] + far[:, last]


def query_places(tokens: int) -> tuple[torch.Tensor, list[int]]:
    """Places [P] of the queries that a block of that many tokens is asked at, and their contexts by index."""
    places, contexts = [], []
    for index, context in enumerate(CONTEXTS):
        if context <= tokens:
            places += [context - 1 - context * q // (16 * QUERIES) for q in range(QUERIES)]
            contexts += [index] * QUERIES
    return torch.tensor(places, dtype=torch.long), contexts


@dataclass(frozen=True)
class MassCurve:
    """Mean mass [L, Hkv, contexts, len(BUDGETS)] held at each measured context, float32."""

    held: torch.Tensor
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, layers: list[MassSums]) -> "MassCurve | None":
        """The means; None when no block was as long as the shortest context."""
        seen = layers[0].queries > 0  # [contexts]; every layer saw the same queries
        if not bool(seen.any()):
            return None
        counts = layers[0].queries[seen][:, None].double()
        held = torch.stack([layer.held[:, seen] / counts for layer in layers]).float()
        return cls(held, tuple(c for c, known in zip(CONTEXTS, seen.tolist(), strict=True) if known))

    def budgets(self, share: float, tokens: int) -> list[list[int]]:
        """Tokens that each layer's KV heads select to hold `share` of the mass in a context of `tokens`.

        Between measured contexts and below them by interpolation. Beyond the longest
        the growth of the last ones goes on (a straight line in logarithms, from constant
        to proportional): an extrapolation, which `ds-offload eval attention` can check.
        At least 1.
        """
        return [
            [max(1, math.ceil(need(head, self.contexts, share, tokens))) for head in layer]
            for layer in self.held
        ]


def need(held: torch.Tensor, contexts: tuple[int, ...], share: float, tokens: int) -> float:
    """Tokens one KV head needs, from its curve held [contexts, budgets]."""
    known = [(math.log2(c), log_need(row.tolist(), share)) for c, row in zip(contexts, held, strict=True)]
    at = math.log2(tokens)
    if at <= known[0][0]:
        return 2 ** (known[0][1] + at - known[0][0])
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if at <= x1:
            return 2 ** (y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    x1, y1 = known[-1]
    return 2 ** (y1 + trend(known[-TREND_POINTS:]) * (at - x1))


def log_need(held: list[float], share: float) -> float:
    """log2 of the budget that holds `share`, between the powers of two by a straight line."""
    for j, value in enumerate(held):
        if value >= share:
            below = held[j - 1] if j else value
            return j - (value - share) / (value - below) if value > below else float(j)
    return float(len(held) - 1)


def trend(points: list[tuple[float, float]]) -> float:
    """Slope of the least-squares line, from 0 (a constant need) to 1 (a constant part of the context)."""
    if len(points) == 1:
        return 1.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return min(1.0, max(0.0, rise / sum((x - mean_x) ** 2 for x, _ in points)))
