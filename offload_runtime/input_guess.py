"""Where a layer's prediction starts from: its predecessor's input, and what calibration knows of the way.

A prediction runs layer i's attention on layer i - 1's input, so what layer i - 1 adds is missing. Two
corrections, each for the layers that a calibration chose: a shift of the input (calibration_shift.py), and a
guess of what is missing from the normalised input, affine and of low rank (calibration_guess.py).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .kernels.products import products, tiles

# Of the recall that full rank has on SmolLM2-135M (E = 576), rank 256 loses 0.0005, 128 0.003, 64 0.007
# (bench/results/prediction_smollm2.json); in the 8B shape 256 is 134 MB in all and 4 MB a prediction.
WIDTHS_A_RANK, MOST_RANK = 2, 256
UP_ROWS = 8  # outputs of a program: 512 programs of 4 KB in the 8B shape, a few for each SM (arithmetic)


def guess_rank(width: int) -> int:
    return min(MOST_RANK, width // WIDTHS_A_RANK)


def guess_bytes(layers: int, width: int, number_bytes: int) -> int:
    """What the guesses of all layers take."""
    return layers * width * (2 * guess_rank(width) + 1) * number_bytes


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
    """

    def __init__(
        self, shift: torch.Tensor | None, guesses: Guesses | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shifted, self.guessed = shifted_layers(shift), guessed_layers(guesses)
        self.shift = None if shift is None else shift.to(device, dtype, copy=True)
        self.guesses = None
        if guesses is not None:
            self.guesses = Guesses(*(part.to(device, dtype, copy=True) for part in guesses.parts))

    def accepts(self, shift: torch.Tensor | None, guesses: Guesses | None) -> bool:
        """Whether set() can take these: for the same layers, and of the same rank."""
        ranks = [None if one is None else one.rank for one in (guesses, self.guesses)]
        alike = (shifted_layers(shift), guessed_layers(guesses)) == (self.shifted, self.guessed)
        return alike and (not self.guessed or ranks[0] == ranks[1])

    def set(self, shift: torch.Tensor | None, guesses: Guesses | None) -> None:
        """Other values of what is corrected; accepts() says which."""
        if self.shifted and shift is not None and self.shift is not None:
            self.shift.copy_(shift)
        if self.guessed and guesses is not None and self.guesses is not None:
            for mine, theirs in zip(self.guesses.parts, guesses.parts, strict=True):
                mine.copy_(theirs)

    def shift_input(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input [B, T, E] that layer `index` is predicted from."""
        if self.shift is None or index not in self.shifted:
            return hidden
        return hidden + self.shift[index].to(hidden.dtype)

    def guess(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """The same, normalised, with the guess of what its predecessor changes there."""
        if self.guesses is None or index not in self.guessed:
            return normed
        offset, down, up = (part[index] for part in self.guesses.parts)
        return with_guess(normed.to(down.dtype), offset, down, up).to(normed.dtype)


def with_guess(
    normed: torch.Tensor, offset: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """normed [B, T, E] + offset [E] + up [E, R] (down [R, E] normed): two launches in a decode step."""
    (low,) = products(normed, [down], [None])  # [B, T, R]
    usual = tiles(normed.numel() // normed.shape[-1])
    tile = usual[0]._replace(rows=max(usual[0].rows, UP_ROWS)) if usual else None
    return products(low, [up], [offset], normed, tile)[0]


def shifted_layers(shift: torch.Tensor | None) -> frozenset[int]:
    """Layers that have a shift [L, E] other than zero."""
    return frozenset() if shift is None else frozenset(shift.any(-1).nonzero().flatten().tolist())


def guessed_layers(guesses: Guesses | None) -> frozenset[int]:
    return frozenset() if guesses is None else guesses.layers
