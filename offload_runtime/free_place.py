"""Who goes next into which place: in a continuous batch, in a job, and in the simulation of one."""

from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice
from typing import TypeVar

Waiting = TypeVar("Waiting")

# Of those that wait, as many are looked at when the first finds no place of its size. Simulated, 24 documents
# of 32K to 128K tokens in eight places that fit just so: 7 s of 166 are waited in their order, 1 s with five.
LOOKED_AT = 5


def smallest_free(rooms: Sequence[int], taken: Container[int], tokens: int) -> int | None:
    """The smallest place not taken that has room for so many tokens, the first of equals; None: none now."""
    fitting = [place for place, room in enumerate(rooms) if place not in taken and room >= tokens]
    return min(fitting, key=lambda place: rooms[place], default=None)


def first_with_place(waiting: Iterable[Waiting], has_place: Callable[[Waiting], bool]) -> int | None:
    """Which of those that wait goes next: the first of those looked at that has a place; None: nobody now."""
    looked_at = enumerate(islice(waiting, LOOKED_AT))
    return next((index for index, one in looked_at if has_place(one)), None)
