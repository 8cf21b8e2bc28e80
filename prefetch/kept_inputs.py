"""Layer inputs that outlive their layers, for predictions on another stream to read."""

import torch


class KeptInputs:
    """Keeps layer `target - 1`'s input until the main stream has waited for the prediction for `target`.

    By reference: the allocator hands memory of the main stream out again only when nothing
    refers to it, and then to the main stream only (in a captured graph, within its pool).
    The reference is dropped after the main stream was made to wait for the prediction, so
    whoever writes there next comes after it, in a graph too, where that wait is an edge.

    That holds as long as a layer does not write into its own input. Whether one does is
    seen the first time it runs, by the tensor's version, and until then a copy is kept.
    """

    def __init__(self) -> None:
        self.kept: dict[int, torch.Tensor] = {}
        self.watched: dict[int, tuple[torch.Tensor, int]] = {}  # an input, and its version when it came
        self.unwritten: set[int] = set()  # targets whose predecessor leaves its input as it is

    def keep(self, target: int, hidden: torch.Tensor) -> torch.Tensor:
        """What the prediction for `target` may read: hidden [B, 1, E], or a copy of it."""
        if target in self.unwritten:
            self.kept[target] = hidden
        else:
            if not hidden.is_inference():  # those have no version
                self.watched[target] = (hidden, hidden._version)
            self.kept[target] = hidden.clone()
        return self.kept[target]

    def release(self, target: int) -> None:
        """The main stream has waited for the prediction for `target`."""
        self.kept.pop(target, None)
        if target in self.watched:
            hidden, version = self.watched.pop(target)
            if hidden._version == version:
                self.unwritten.add(target)
