"""The full KV cache: every token's row of one layer, in host memory or, where it fits, on the GPU.

[B, Hkv, capacity, row]: one contiguous region a layer, head-major, because a
random gather runs at the link's speed only while its rows lie within about a
GiB (address translation, measured).
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .layout import KVLayout
from .pinned import pinned_empty


class HostRows:
    """One layer's rows. `rows` waits for the allocation, which may run in the background.

    place: "cpu", or the GPU that the model is on; pin: page-lock what is on the CPU.
    """

    def __init__(
        self, layout: KVLayout, place: torch.device, pin: bool, allocator: ThreadPoolExecutor
    ) -> None:
        self.shape = (layout.batch, layout.kv_heads, layout.capacity, layout.row_elements)
        self.dtype = layout.dtype
        self._pending: Future[torch.Tensor] = Future()
        if place.type == "cpu":
            self._pending = allocator.submit(self._allocate, pin)
        else:
            self._pending.set_result(torch.empty(self.shape, dtype=self.dtype, device=place))

    def _allocate(self, pin: bool) -> torch.Tensor:
        if pin:
            return pinned_empty(self.shape, self.dtype)
        try:
            return torch.empty(self.shape, dtype=self.dtype)
        except RuntimeError as error:  # what PyTorch makes of a failed allocation on the CPU
            size = torch.Size(self.shape).numel() * self.dtype.itemsize
            raise MemoryError(f"cannot allocate {size / 1e9:.2f} GB of host memory for KV rows") from error

    @property
    def rows(self) -> torch.Tensor:
        """[B, Hkv, capacity, row]; raises MemoryError if the host had no room."""
        return self._pending.result()
