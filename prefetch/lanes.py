"""Two lanes of GPU work: decode steps, and the prefill of a newcomer that they run in the shadow of.

A prefill is bound by arithmetic and a decode step by the link and by memory, so
each leaves what the other needs. One thread launches both: a few chunks of the
prefill ahead, then decode steps until the GPU has caught up.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .scheduler import URGENT


class Lanes:
    """The two streams and the events between them; nothing of it exists on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: deque[torch.cuda.Event] = deque()
        if self.on_gpu:
            self.decode, self.prefill = torch.cuda.Stream(device, priority=URGENT), torch.cuda.Stream(device)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Work of decode steps."""
        if not self.on_gpu:
            yield
            return
        with torch.cuda.stream(self.decode):
            yield

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """A newcomer's prefill, after the decode steps so far: they may have used the same rows."""
        if not self.on_gpu:
            yield
            return
        self.marks.clear()
        self.prefill.wait_stream(self.decode)
        with torch.cuda.stream(self.prefill):
            yield

    def follow_caller(self) -> None:
        """Order both lanes after what the caller's stream has been given."""
        if self.on_gpu:
            for stream in (self.decode, self.prefill):
                stream.wait_stream(torch.cuda.current_stream())

    def mark(self) -> None:
        """Note that another chunk of the prefill has been launched."""
        if self.on_gpu:
            self.marks.append(self.prefill.record_event())

    def ahead(self) -> int:
        """Marks that the GPU has not reached yet."""
        while self.marks and self.marks[0].query():
            self.marks.popleft()
        return len(self.marks)

    def meet(self) -> None:
        """Order the decode steps to come after the prefill, its copies to host memory included."""
        if self.on_gpu:
            self.decode.wait_stream(self.prefill)
