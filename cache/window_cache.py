"""A sliding layer's cache: its last `window` rows, all on the device, attended to densely.

Such a layer never looks further back, so nothing of it goes to host memory, and
nothing is selected, fetched or predicted.
"""

import torch

from ..kernels.append import append_rows
from ..kernels.sparse_decode import sparse_attention
from .layer_cache import BatchState
from .layout import KVLayout


class WindowCache:
    """ring [B, Hkv, window, row]: position p lies at p % window."""

    def __init__(self, layout: KVLayout, state: BatchState, window: int, device: torch.device) -> None:
        self.layout, self.state, self.window = layout, state, window
        heads = (layout.batch, layout.kv_heads)
        self.ring = torch.empty((*heads, window, layout.row_elements), dtype=layout.dtype, device=device)
        # Attention over the window is sparse attention with a ring of `window` and nothing selected.
        self.no_tokens = torch.zeros((*heads, 1), dtype=torch.int32, device=device)
        self.no_counts = torch.zeros(heads, dtype=torch.int32, device=device)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the current token: key and value [B, Hkv, D]."""
        append_rows(key, value, self.state.lengths, self.ring, 0, self.window, None)

    def attend(
        self,
        query: torch.Tensor,
        scale: float,
        softcap: float = 0.0,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [B, Hq, D] over the last `window` tokens, the current one included."""
        return sparse_attention(
            query,
            self.ring,
            self.no_tokens,
            self.no_counts,
            self.no_tokens,
            self.state.lengths,
            0,
            self.window,
            scale,
            softcap,
            sink_logits,
        )

    def load(self, sequence: int, rows: torch.Tensor) -> None:
        """Take over the last `window` of one sequence's rows [Hkv, S, row]."""
        length = rows.shape[1]
        positions = torch.arange(max(0, length - self.window), length)
        latest = rows[:, positions.to(rows.device)].to(self.ring.device)  # [Hkv, n, row]
        self.ring[sequence][:, (positions % self.window).to(self.ring.device)] = latest

    def restore(self, sequence: int, rows: torch.Tensor) -> None:
        """Write the last `window` rows back to their places in rows [Hkv, S, row]; S as it was loaded."""
        length = rows.shape[1]
        positions = torch.arange(max(0, length - self.window), length, device=rows.device)
        rows[:, positions] = self.ring[sequence][:, positions % self.window]

    def keepable(self, cached: int, shared: int) -> int:
        """How many of `shared` leading tokens can stay when the ring holds the last of `cached` tokens."""
        reaches_back = cached <= self.window or shared >= cached - 1
        return shared if reaches_back else 0
