"""A selection, and the buffers that a selection is made in."""

import torch

from .layout import KVLayout


class Selection:
    """The tokens one layer attends to besides sinks and recent ones: ascending, counts [B, Hkv] of them."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        shape = (layout.batch, layout.kv_heads, layout.budget)
        self.tokens = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)


class Workspace:
    """Scratch that one stream's selections share: scores and the list of missed rows."""

    def __init__(self, layout: KVLayout, device: torch.device) -> None:
        heads = (layout.batch, layout.kv_heads)
        self.scores = torch.empty((*heads, layout.capacity), dtype=torch.float32, device=device)
        self.miss_tokens = torch.empty((*heads, layout.budget), dtype=torch.int32, device=device)
        self.miss_slots = torch.empty_like(self.miss_tokens)
        self.miss_counts = torch.empty(heads, dtype=torch.int32, device=device)
