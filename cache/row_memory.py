"""Host memory for rows, made in the background and used by one session after another.

For a GPU it is managed memory (managed.py), or where there is none registered memory. Making it costs
0.13 to 0.25 s/GiB, so a region whose session is gone is kept for the next one that it is large enough for.
Regions are made in the order in which they are asked for: pages are populated by all cores
while the region before is registered, which is one thread's work under a lock of the driver.
"""

import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from .managed import managed_pages
from .pinned import Spans, mapped, populate, register


@dataclass(eq=False)
class Region:
    """One stretch of host memory. lease: None if it was never lent, or what returns None once it is back.

    spans: the parts that have memory behind them; (): all.
    """

    nbytes: int
    pages: "Future[np.ndarray]"
    spans: Spans = ()
    lease: Callable[[], object] | None = None

    @property
    def idle(self) -> bool:
        return self.lease is None or self.lease() is None

    @property
    def filled_bytes(self) -> int:
        return sum(size for _, size in self.spans) if self.spans else self.nbytes

    def serves(self, nbytes: int, spans: Spans) -> bool:
        """Whether it is free for a use of so many bytes that needs memory in these parts."""
        return self.idle and self.nbytes >= nbytes and self.spans in ((), spans)


@dataclass
class RowMemory:
    """Regions of one model. device: where the model is; on a GPU the memory is such as the GPU can use.

    populate_s and register_s: seconds spent in the background so far.
    """

    device: torch.device
    regions: list[Region] = field(default_factory=list)
    populate_s: float = 0.0
    register_s: float = 0.0

    def __post_init__(self) -> None:
        self.on_gpu = self.device.type == "cuda"
        self._populating = ThreadPoolExecutor(1, thread_name_prefix="row-pages")
        self._registering = ThreadPoolExecutor(1, thread_name_prefix="row-pins")

    def prepare(self, count: int, nbytes: int, spans: Spans = ()) -> None:
        """Begin to make what `count` calls of take() for nbytes each will need."""
        missing = count - sum(region.serves(nbytes, spans) for region in self.regions)
        for _ in range(missing):
            self._make(nbytes, spans)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, spans: Spans = ()) -> "Future[torch.Tensor]":
        """A tensor of its own region, uninitialised; the region is idle again when no tensor uses it.

        spans: the bytes that will be used, by default all; where the GPU has no managed memory all of it is
        made. The future raises MemoryError if the host had no room.
        """
        elements = torch.Size(shape).numel()
        nbytes = max(elements * dtype.itemsize, 1)
        fitting = [region for region in self.regions if region.serves(nbytes, spans)]
        region = min(fitting, key=lambda each: each.nbytes) if fitting else self._make(nbytes, spans)
        out: Future[torch.Tensor] = Future()
        waiting = [out]  # emptied below: a future keeps its callbacks, which must not keep the tensor
        region.lease = lambda: waiting

        def lend(made: "Future[np.ndarray]") -> None:
            asked, error = waiting.pop(), made.exception()
            if error is not None:
                asked.set_exception(error)
                return
            view = made.result()[:nbytes]  # lives as long as any tensor that shares its memory
            region.lease = weakref.ref(view)
            with torch.enable_grad():  # a view made without may not be written to with
                rows = torch.from_numpy(view).view(dtype)[:elements].view(shape)
            asked.set_result(rows)

        region.pages.add_done_callback(lend)
        return out

    @property
    def idle_bytes(self) -> int:
        """Bytes that a new session may use, or that are freed for it."""
        return sum(region.filled_bytes for region in self.regions if region.idle and region.pages.done())

    def free(self) -> None:
        """Give idle regions back to the system."""
        self.regions = [region for region in self.regions if not region.idle]

    def _make(self, nbytes: int, spans: Spans) -> Region:
        """A new region; idle ones that cannot serve are freed first."""
        unfit = [region for region in self.regions if region.idle and not region.serves(nbytes, spans)]
        self.regions = [region for region in self.regions if region not in unfit]
        # Freed by the thread that maps, before it does: unlocking takes time too.
        pages = self._populating.submit(self._populated, nbytes, spans, unfit)
        region = Region(nbytes, self._registering.submit(self._registered, pages), spans)
        self.regions.append(region)

        def forget_failed(made: "Future[np.ndarray]") -> None:
            if made.exception() is not None:
                self.regions = [each for each in self.regions if each is not region]

        region.pages.add_done_callback(forget_failed)
        return region

    def _populated(self, nbytes: int, spans: Spans, freed: list[Region]) -> tuple[np.ndarray, bool]:
        """Pages with memory behind them, and whether the GPU maps them already."""
        freed.clear()
        began = time.perf_counter()
        pages = managed_pages(nbytes, self.device, spans) if self.on_gpu else None
        managed = pages is not None
        if pages is None:
            pages = mapped(nbytes)
            if self.on_gpu:
                populate(pages)
        self.populate_s += time.perf_counter() - began
        return pages, managed

    def _registered(self, made: "Future[tuple[np.ndarray, bool]]") -> np.ndarray:
        pages, managed = made.result()
        began = time.perf_counter()
        if self.on_gpu and not managed:
            register(pages)
        self.register_s += time.perf_counter() - began
        return pages
