"""A selection, and the buffers that a selection is made in."""

from typing import NamedTuple

import torch

from ..kernels.admission import empty_candidates
from .layout import KVLayout


class Selection:
    """The tokens one layer attends to besides sinks and recent ones: ascending, counts [B, Hkv] of them.

    slots: theirs, as far as the selection says (a sticky one that the step attends to).
    """

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        shape = (layout.batch, layout.kv_heads, layout.budget)
        self.tokens = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
        self.slots = torch.empty_like(self.tokens)


class Misses:
    """Rows to gather: tokens and the slots they get [B, Hkv, K], counts [B, Hkv] of them."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        shape = (layout.batch, layout.kv_heads, layout.budget)
        self.tokens = torch.empty(shape, dtype=torch.int32, device=device)
        self.slots = torch.empty_like(self.tokens)
        self.counts = torch.empty(shape[:2], dtype=torch.int32, device=device)

    @property
    def lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the kernels take them."""
        return self.tokens, self.slots, self.counts


class Workspace:
    """Scratch that one stream's selections share: scores and the list of missed rows.

    With sticky selection also the tokens that may enter, the candidates, and the rows missed besides, if any.
    """

    def __init__(self, layout: KVLayout, device: torch.device, sticky: bool) -> None:
        heads = (layout.batch, layout.kv_heads)
        self.scores = torch.empty((*heads, layout.capacity), dtype=torch.float32, device=device)
        self.misses = Misses(layout, device)
        if sticky:
            self.entering, self.late_misses = Selection(layout, device), Misses(layout, device)
            self.candidates = empty_candidates(*heads, layout.most_candidates, device)


class Choice(NamedTuple):
    """What a layer attends to, what it was selected in, and in which phase of the step."""

    selection: Selection
    work: Workspace
    phase: int
