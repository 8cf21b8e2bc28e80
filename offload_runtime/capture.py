"""Capture a CUDA graph, or come out of a failed capture with torch as it was before."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


def capture(
    work: Callable[[], None], device: torch.device, stream: torch.cuda.Stream | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of what `work` launches, captured on `stream`; nothing runs.

    RuntimeError with the first cause if it cannot be captured.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # torch.cuda.graph leaves its own stream current when it cannot end; the outer context does not.
        with (
            nothing_freed_by_chance(),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream),
        ):
            work()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        release(device, pool)
        first = error.__context__  # what went wrong; `error` may be that the capture could not be ended
        raise (first if isinstance(first, RuntimeError) else error) from None
    return graph


@contextmanager
def nothing_freed_by_chance() -> Iterator[None]:
    """No search for cycles meanwhile: pinned memory of a model that is gone is unlocked when it is found, and
    a capture does not survive that call, nor does the memory get unlocked (H100, in the tests)."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


def release(device: torch.device, pool: tuple[int, int]) -> None:
    """Undo what torch leaves behind when ending a capture fails."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # the allocator is out of the pool already
        torch._C._cuda_endAllocateToPool(index, pool)
    # The generator still takes itself for captured and would refuse to sample. A copy of its state,
    # seed and offset alike, does not.
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
