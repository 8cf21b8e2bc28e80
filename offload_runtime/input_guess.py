"""Where a layer's prediction starts from: its predecessor's input, and what calibration knows of the way.

A prediction runs layer i's attention on layer i - 1's input, so what layer i - 1 adds is missing. Two
corrections, each for the layers that a calibration chose: a shift of the input (calibration_shift.py), and a
guess of what is missing from the normalised input, affine and of low rank (calibration_guess.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from .kernels.products import products, tiles

# Of the recall that full rank has on SmolLM2-135M (E = 576), rank 256 loses 0.0005, 128 0.003, 64 0.007
# (bench/results/prediction_smollm2.json); in the 8B shape 256 is 134 MB in all and 4 MB a prediction.
WIDTHS_A_RANK, MOST_RANK = 2, 256
UP_ROWS = 8  # outputs of a program: 512 programs of 4 KB in the 8B shape, a few for each SM (arithmetic)


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # offset [N], down [R, E], up [N, R]


def guess_rank(width: int) -> int:
    return min(MOST_RANK, width // WIDTHS_A_RANK)


def guess_bytes(layers: int, width: int, query_width: int, number_bytes: int) -> int:
    """What the guesses of all layers take: of inputs [E] or of queries [Hq D], whichever is more."""
    rank, most = guess_rank(width), max(width, query_width)
    return layers * (rank * width + (rank + 1) * most) * number_bytes


@dataclass(frozen=True)
class Guesses:
    """For every layer, of the normalised input x [E] that a prediction has: x + offset + up (down x).

    offset [L, E], down [L, R, E], up [L, E, R]; zero for the layers that have none.
    """

    offset: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.offset, self.down, self.up

    @cached_property
    def layers(self) -> frozenset[int]:
        """Those that have one; found once, for every generate asks and the 8B shape has 34 M numbers."""
        return frozenset(self.up.flatten(1).any(-1).nonzero().flatten().tolist())

    @property
    def rank(self) -> int:
        return self.down.shape[1]


class InputCorrection:
    """The corrections of one session's predictions, in place for good: captured graphs read them.

    shift [L, E] and guesses may be None. Which layers have which, and the rank, stay as they are at first.
    projections: the plain query projections by layer, as far as there are any. A guess is carried through
    its layer's at once, W (x + offset + up (down x)) = W x + W offset + (W up) (down x), so that W x and
    down x are one launch and need not wait for each other. predicted: the layers that are; None: all.
    """

    def __init__(
        self,
        shift: torch.Tensor | None,
        guesses: Guesses | None,
        dtype: torch.dtype,
        device: torch.device,
        projections: Mapping[int, nn.Linear] | None = None,
        predicted: frozenset[int] | None = None,
    ) -> None:
        self.predicted = predicted
        self.shifted, self.guessed = self._corrected(shift, guesses)
        self.shift = None if shift is None or not self.shifted else shift.to(device, dtype, copy=True)
        self.projections = {i: linear for i, linear in (projections or {}).items() if i in self.guessed}
        self.dtype, self.device = dtype, device
        # By layer, contiguous: offset, down and up, the first and the last carried through its projection.
        self.parts = {} if guesses is None else {index: self._made(index, guesses) for index in self.guessed}

    def _corrected(
        self, shift: torch.Tensor | None, guesses: Guesses | None
    ) -> tuple[frozenset[int], frozenset[int]]:
        """The predicted layers with a shift, and those with a guess."""
        found = shifted_layers(shift), guessed_layers(guesses)
        return found if self.predicted is None else (found[0] & self.predicted, found[1] & self.predicted)

    def _made(self, index: int, guesses: Guesses) -> Parts:
        offset, down, up = (part[index].to(self.device, copy=True) for part in guesses.parts)
        if index in self.projections:
            weight = self.projections[index].weight.detach().float()  # [Q, E]
            offset, up = weight @ offset.float(), weight @ up.float()  # [Q], [Q, R]
        return offset.to(self.dtype), down.to(self.dtype), up.to(self.dtype)

    def accepts(self, shift: torch.Tensor | None, guesses: Guesses | None) -> bool:
        """Whether set() can take these: for the same layers, and of the same rank."""
        alike = self._corrected(shift, guesses) == (self.shifted, self.guessed)
        ranks = {len(down) for _, down, _ in self.parts.values()}
        return alike and (guesses is None or ranks <= {guesses.rank})

    def set(self, shift: torch.Tensor | None, guesses: Guesses | None) -> None:
        """Other values of what is corrected; accepts() says which."""
        if shift is not None and self.shift is not None:
            self.shift.copy_(shift)
        if guesses is not None:
            for index, parts in self.parts.items():
                for mine, theirs in zip(parts, self._made(index, guesses), strict=True):
                    mine.copy_(theirs)

    def shift_input(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input [B, T, E] that layer `index` is predicted from."""
        if self.shift is None or index not in self.shifted:
            return hidden
        return hidden + self.shift[index].to(hidden.dtype)

    def guess(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """The same, normalised, with the guess of what its predecessor changes, unless project() adds it."""
        if index not in self.parts or index in self.projections:
            return normed
        offset, down, up = self.parts[index]
        (low,) = products(normed.to(down.dtype), [down], [None])  # [B, T, R]
        return add_guess(low, offset, up, normed.to(down.dtype)).to(normed.dtype)

    def project(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """Layer `index`, one of projections: its projection [B, T, Q] of normed [B, T, E] with the guess."""
        offset, down, up = self.parts[index]
        linear = self.projections[index]
        plain, low = products(normed, [linear.weight, down], [linear.bias, None])
        return add_guess(low, offset, up, plain)


def add_guess(low: torch.Tensor, offset: torch.Tensor, up: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """plain [B, T, N] + offset [N] + up [N, R] low [B, T, R]."""
    usual = tiles(low.numel() // low.shape[-1])
    tile = usual[0]._replace(rows=max(usual[0].rows, UP_ROWS)) if usual else None
    return products(low, [up], [offset], plain, tile)[0]


def shifted_layers(shift: torch.Tensor | None) -> frozenset[int]:
    """Layers that have a shift [L, E] other than zero."""
    return frozenset() if shift is None else frozenset(shift.any(-1).nonzero().flatten().tolist())


def guessed_layers(guesses: Guesses | None) -> frozenset[int]:
    return frozenset() if guesses is None else guesses.layers
