"""Byte arithmetic of the caches: shapes and sizes, nothing allocated.

A row is K and V of one token and KV head side by side. Rows are 64-byte
aligned wherever head_dim is a multiple of 16 (16-bit models), which every
common model has; off that alignment some GPUs gather 4 to 18 times slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..kernels.admission import most_candidates
from ..kernels.history import row_bytes

SCALE_PAIR_BYTES = 4  # float16 scale and offset of one token's label
INT32_BYTES = 4
HOST_PAGE_BYTES = 2 << 20  # of managed memory: a head's rows may end in the middle of one
SCORE_BYTES = 4  # float32


@dataclass(frozen=True)
class KVLayout:
    """Sizes of one model's caches. Token counts are per sequence; slots are per layer and KV head."""

    layers: int
    batch: int
    query_heads: int
    kv_heads: int
    head_dim: int
    capacity: int  # tokens a sequence can hold
    budget: int  # K: largest number of selected tokens
    sinks: int
    recent: int
    slots: int  # resident rows, at least budget
    label_channels: int  # R
    label_bits: int
    dtype: torch.dtype
    windows: tuple[int, ...] = ()  # tokens of each sliding layer's ring; `layers` are the offloaded ones
    place_tokens: tuple[int, ...] = ()  # of each sequence that have host memory; empty: capacity each

    @property
    def row_elements(self) -> int:
        """Elements of one row: K, then V."""
        return 2 * self.head_dim

    @property
    def row_bytes(self) -> int:
        return self.row_elements * self.dtype.itemsize

    @property
    def fixed_slots(self) -> int:
        """Places of the sinks and the recent ring, in front of the resident slots."""
        return self.sinks + self.recent

    @property
    def heads(self) -> int:
        """KV heads of the whole batch."""
        return self.batch * self.kv_heads

    @property
    def rooms(self) -> tuple[int, ...]:
        """Tokens of each sequence that there is host memory for."""
        return self.place_tokens or (self.capacity,) * self.batch

    @property
    def region_bytes(self) -> int:
        """Address space of one layer's rows [B, Hkv, capacity, row]."""
        return self.heads * self.capacity * self.row_bytes

    @property
    def host_bytes(self) -> int:
        """Pinned bytes of one layer's rows [B, Hkv, capacity, row], as far as they have memory."""
        if not self.place_tokens:
            return self.region_bytes
        return self.kv_heads * sum(n * self.row_bytes + HOST_PAGE_BYTES for n in self.place_tokens)

    @property
    def label_bytes(self) -> int:
        """GPU bytes of one layer's labels."""
        pair = SCALE_PAIR_BYTES if self.label_bits < 16 else 0
        return self.heads * self.capacity * (self.label_channels * self.label_bits // 8 + pair)

    @property
    def slot_bytes(self) -> int:
        """GPU bytes of one layer's slots: sinks, ring and resident rows."""
        return self.heads * (self.fixed_slots + self.slots) * self.row_bytes

    @property
    def map_bytes(self) -> int:
        """GPU bytes of one layer's token-to-slot map, its inverse and its two stamps a slot."""
        return self.heads * (self.capacity + 3 * self.slots) * INT32_BYTES

    @property
    def window_bytes(self) -> int:
        """GPU bytes of all sliding layers' rings."""
        return self.heads * sum(self.windows) * self.row_bytes

    @property
    def workspace_bytes(self) -> int:
        """GPU bytes shared by all layers: three workspaces (scores, miss lists) and three selections."""
        scores = self.heads * self.capacity * SCORE_BYTES
        return 3 * (scores + self.miss_bytes + self.selection_bytes)

    @property
    def sticky_workspace_bytes(self) -> int:
        """GPU bytes that sticky selection adds to them: of each what may enter, candidates, more misses."""
        candidates = self.heads * (self.most_candidates * (INT32_BYTES + SCORE_BYTES) + INT32_BYTES)
        return 3 * (self.selection_bytes + self.miss_bytes + candidates)

    @property
    def miss_bytes(self) -> int:
        """GPU bytes of one list of misses: tokens and slots [B, Hkv, K] and counts [B, Hkv]."""
        return self.heads * (2 * self.budget + 1) * INT32_BYTES

    @property
    def most_candidates(self) -> int:
        """Of one sticky selection and KV head: kernels/admission.py."""
        return most_candidates(self.budget, self.capacity)

    @property
    def selection_bytes(self) -> int:
        """GPU bytes of one selection: tokens and slots [B, Hkv, K] and counts [B, Hkv]."""
        return self.heads * (2 * self.budget + 1) * INT32_BYTES

    @property
    def history_bytes(self) -> int:
        """GPU bytes of one layer's last selections: kernels/history.py."""
        return self.heads * row_bytes(self.capacity)

    @property
    def sticky_bytes(self) -> int:
        """GPU bytes that sticky selection adds: each layer's history, and its part of the workspaces."""
        return self.layers * self.history_bytes + self.sticky_workspace_bytes

    @property
    def gpu_bytes(self) -> int:
        """GPU bytes of all layers' caches and of what they share."""
        offloaded = self.layers * (self.label_bytes + self.slot_bytes + self.map_bytes)
        return offloaded + self.window_bytes + self.workspace_bytes


def biting(windows: Sequence[int], capacity: int) -> tuple[int, ...]:
    """Each layer's window, 0 where there is none or where it holds every token that fits."""
    return tuple(window if window < capacity else 0 for window in windows)
