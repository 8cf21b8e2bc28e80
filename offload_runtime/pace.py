"""How many decode steps go beside a prefill: as few as keep the places full.

A step makes the prefill beside it later by about as much whether it has two sequences or eight, for what it
takes from the prefill is mostly reading the weights (8B shape, H100: 4.2 s for 65,536 tokens alone, 4.93
beside 89 steps of four sequences, so 8 ms a step). So a step should have as many sequences as
there are places: each sequence may take as long as the other places take to be filled, but when nothing else
is free, one has to end with the prefill.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Prompts are not of one length: at the mean pace places are filled late. Simulated, 48 documents of 32K to
# 128K tokens in eight places with room to spare, twelve draws: of 300 s, 15 are waited at 1.1, 10 at 1.25,
# 8 at 1.4, 7 at 1.5, and from there on more steps cost prefills what less waiting gains.
SLACK = 1.4


@dataclass
class Pace:
    """The steps beside the prefills of one batch. prompts, answers: tokens of all that joined so far."""

    places: int
    prompts: int = 0
    answers: int = 0
    steps: float = 0.0  # beside the prefill under way
    taken: int = 0
    share: float = 0.0  # of that prefill, launched

    def begin(self, prompt: int, answer: int, left: Iterable[int]) -> None:
        """A prompt of so many tokens joins, with so many to come; left: those to come of the others."""
        self.prompts, self.answers = self.prompts + prompt, self.answers + answer
        self.taken, self.share = 0, 0.0
        others = list(left)
        # Each sequence decodes while the other places are filled with prompts of the mean length.
        self.steps = SLACK * self.answers / self.prompts * prompt / max(self.places - 1, 1)
        if others and len(others) == self.places - 1:
            self.steps = max(self.steps, min(others))

    def ended(self, answer: int, expected: int) -> None:
        """A sequence ended after `answer` of the `expected` tokens."""
        self.answers += answer - expected

    @property
    def due(self) -> bool:
        """Whether another step belongs beside what is launched of the prefill."""
        return self.taken < math.ceil(self.steps * self.share)
