"""Which place a newcomer takes: in a continuous batch, and in the simulation of one."""

from collections.abc import Container, Sequence


def smallest_free(rooms: Sequence[int], taken: Container[int], tokens: int) -> int | None:
    """The smallest place not taken that has room for so many tokens, the first of equals; None: none now."""
    fitting = [place for place, room in enumerate(rooms) if place not in taken and room >= tokens]
    return min(fitting, key=lambda place: rooms[place], default=None)
