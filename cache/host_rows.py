"""The full KV cache: every token's row of one layer, in host memory or, where it fits, on the GPU.

[B, Hkv, capacity, row]: one contiguous region a layer, head-major, because a
random gather runs at the link's speed only while its rows lie within about a
GiB (address translation, measured).
"""

import functools
from concurrent.futures import Future
from typing import Protocol

import torch

from .layout import KVLayout
from .managed import gpu_alias
from .pinned import Spans


class Lender(Protocol):
    """Who has host memory to lend, as RowMemory."""

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, spans: Spans = ()
    ) -> "Future[torch.Tensor]": ...


class HostRows:
    """One layer's rows. `rows` waits for the memory, which may still be in the making.

    place: "cpu", or the GPU that the model is on; device: where the model is.
    """

    def __init__(self, layout: KVLayout, place: torch.device, memory: Lender, device: torch.device) -> None:
        self.device = device
        self.shape = (layout.batch, layout.kv_heads, layout.capacity, layout.row_elements)
        self._pending: Future[torch.Tensor] = Future()
        if place.type == "cpu":
            self._pending = memory.take(self.shape, layout.dtype, head_spans(layout))
        else:
            self._pending.set_result(torch.empty(self.shape, dtype=layout.dtype, device=place))

    @property
    def rows(self) -> torch.Tensor:
        """[B, Hkv, capacity, row]; raises MemoryError if the host had no room."""
        return self._pending.result()

    @functools.cached_property
    def link_rows(self) -> torch.Tensor:
        """`rows` as copies to and from the GPU should name them."""
        return gpu_alias(self.rows, self.device)


def head_spans(layout: KVLayout) -> Spans:
    """What of [B, Hkv, capacity, row] needs memory: the front of every head's rows; (): everything."""
    head_bytes = layout.capacity * layout.row_bytes
    return tuple(
        ((sequence * layout.kv_heads + head) * head_bytes, tokens * layout.row_bytes)
        for sequence, tokens in enumerate(layout.place_tokens)
        for head in range(layout.kv_heads)
    )
