"""How far the residual stream moves from one layer's input to the next one's, on average over tokens.

A layer's query is predicted from its predecessor's input, so what the predecessor adds is
missing. In the first layers most of that is the same for every token and can be added beforehand: one
vector a layer. Recall of the best N/16 keys (bench/results/prediction_*.json): layer 1 of tiny-256k
0.14 -> 0.72, layers 1 and 2 of SmolLM2-135M 0.27 -> 0.83 and 0.44 -> 0.88.

Only layers that predict badly without it are shifted. In the others the mean of prose gains 0.002 to 0.07
on prose and moves rare queries away: with all layers shifted and mode "predict", tiny-256k found 6 of 8
pass keys in 8,192 tokens at a budget of 1/64 instead of 8, and 7 at 1/16.
"""

from dataclasses import dataclass, field

import torch

# The first tokens carry a few huge activations (attention sinks); the runtime never selects them.
SKIPPED_TOKENS = 16


@dataclass
class ShiftSums:
    """Sums of layer inputs less their predecessors' [E] float64 by layer, and the tokens summed by layer."""

    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, hidden: torch.Tensor, before: torch.Tensor) -> None:
        """Layer `index`'s input and the layer before's, [T, E], of one text."""
        moved = (hidden[SKIPPED_TOKENS:].float() - before[SKIPPED_TOKENS:].float()).sum(0).double()
        known = self.sums.get(index)
        self.sums[index] = moved if known is None else known + moved
        self.tokens[index] = self.tokens.get(index, 0) + max(0, len(hidden) - SKIPPED_TOKENS)

    def mean(self, index: int) -> torch.Tensor:
        """[E] float32; zero where no token was seen."""
        return (self.sums[index] / max(1, self.tokens[index])).float()

    def means(self, shifted: list[bool]) -> torch.Tensor | None:
        """[L, E] float32, zero for layers that are not shifted; None when none is."""
        if not any(shifted):
            return None
        like = next(iter(self.sums.values()))
        rows = [self.mean(i).cpu() if kept else torch.zeros(len(like)) for i, kept in enumerate(shifted)]
        return torch.stack(rows)
