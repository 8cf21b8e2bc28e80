"""One pinned store of random rows that all settings of a shape read, because pinning 34 GB takes 11 s."""

from concurrent.futures import Future

import torch

from offload_runtime.cache.managed import gpu_alias
from offload_runtime.cache.pinned import Spans
from offload_runtime.cache.row_memory import RowMemory

PIECE_BYTES = 256 << 20  # of random rows that are made at a time


class HostStore:
    """`layers` regions of elements_a_layer random numbers each, pinned where there is a GPU.

    A setting of a shorter context or a smaller batch reads the front of every region.
    """

    def __init__(self, layers: int, elements_a_layer: int, dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        memory = RowMemory(device)
        asked = [memory.take((elements_a_layer,), dtype) for _ in range(layers)]
        self.regions = [region.result() for region in asked]
        piece = min(PIECE_BYTES // dtype.itemsize, elements_a_layer)
        rows = torch.randn(piece, device=device, dtype=dtype)
        for region in self.regions:
            for part in gpu_alias(region, device).split(piece):
                part.copy_(rows[: len(part)], non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in self.regions)

    def view(self, layer: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The front of one region as rows [B, Hkv, N, 2 D]."""
        return self.regions[layer][: torch.Size(shape).numel()].view(shape)


class HandedOut:
    """In the place of a session's RowMemory: hands out the store's regions, one a layer, in order."""

    def __init__(self, store: HostStore, shape: tuple[int, ...]) -> None:
        self.views = iter([store.view(layer, shape) for layer in range(len(store.regions))])

    def take(
        self, _shape: tuple[int, ...], _dtype: torch.dtype, _spans: Spans = ()
    ) -> "Future[torch.Tensor]":
        """As RowMemory's: a future that holds the next region."""
        ready: Future[torch.Tensor] = Future()
        ready.set_result(next(self.views))
        return ready
