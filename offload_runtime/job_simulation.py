"""How long a job takes with places of given sizes: its prefills and steps one after the other, in arithmetic.

The order of documents, the places they wait for and the pace of steps beside prefills are those of
continuous.py; the times are the plan's.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .free_place import first_with_place, smallest_free
from .pace import Pace

# Measured, 8B shape, prompts of 76K tokens on average: a step of four sequences beside a prefill takes 58 ms,
# alone some 28, and makes the prefill 8 to 12 ms later (bench/results/continuous.json).
STEP_BESIDE = 58 / 28
PREFILL_LATER = 0.4
PARTS = 64  # a prefill goes on in so many parts while no step is due: finer than the pace of steps


@dataclass(frozen=True)
class Speeds:
    """prefill: seconds a token of the prompt; steps: seconds of a step of 1, 2, ... sequences, alone."""

    prefill: float
    steps: Sequence[float]


class Simulation:
    """A job under way. left: tokens to come of each place's sequence."""

    def __init__(self, sizes: Sequence[int], new_tokens: int, speeds: Speeds) -> None:
        self.sizes, self.new_tokens, self.speeds = sizes, new_tokens, speeds
        self.left: dict[int, int] = {}
        self.pace, self.seconds = Pace(len(sizes)), 0.0

    def run(self, needs: Sequence[int]) -> float:
        """Seconds for documents that need so many tokens each, answers included."""
        waiting = deque(needs)
        while waiting or self.left:
            full = len(self.left) == len(self.sizes)
            index = None if full else first_with_place(waiting, self._has_place)
            if index is None:
                self._step(1.0)
            else:
                tokens = waiting[index]
                del waiting[index]
                self._prefill(tokens)
        return self.seconds

    def _has_place(self, tokens: int) -> bool:
        return self._place_for(tokens) is not None

    def _place_for(self, tokens: int) -> int | None:
        largest = max(self.sizes)  # a document that no place holds takes the largest
        return smallest_free(self.sizes, self.left, min(tokens, largest))

    def _prefill(self, tokens: int) -> None:
        place = self._place_for(tokens)
        assert place is not None
        prompt = max(1, tokens - self.new_tokens)
        self.pace.begin(prompt, self.new_tokens, self.left.values())
        work, done = prompt * self.speeds.prefill, 0.0
        while done < work:
            self.pace.share = done / work
            if self.left and self.pace.due:
                self.pace.taken += 1
                later = PREFILL_LATER * self.speeds.steps[len(self.left) - 1]
                done += self._step(STEP_BESIDE) - later
            else:
                done += work / PARTS
                self.seconds += work / PARTS
        if self.new_tokens > 1:  # the first comes with the prefill
            self.left[place] = self.new_tokens - 1

    def _step(self, times: float) -> float:
        """All at work get a token; returns its seconds, so many times a step's alone."""
        took = times * self.speeds.steps[len(self.left) - 1]
        self.seconds += took
        self.left = {place: left - 1 for place, left in self.left.items() if left > 1}
        return took
