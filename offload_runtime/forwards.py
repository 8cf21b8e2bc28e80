"""Give modules another forward function for a while."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Replacement = tuple[Any, Callable[..., Any]]  # a module and its forward function meanwhile


@contextmanager
def replaced(pairs: Sequence[Replacement]) -> Iterator[None]:
    """Afterwards each module has the forward it had before, which may be a replacement too."""
    before = [vars(module).get("forward") for module, _ in pairs]
    try:
        for module, forward in pairs:
            module.forward = forward
        yield
    finally:
        for (module, _), earlier in zip(pairs, before, strict=True):
            if earlier is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = earlier
