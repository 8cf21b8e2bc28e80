"""Two lanes of GPU work: decode steps, and the prefill of a newcomer that they run in the shadow of.

A prefill is bound by arithmetic and a decode step by the link and by memory, so
each leaves what the other needs. One thread launches both: a decode step, and while
it runs a few chunks of the prefill ahead.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .green_stream import stream_beside
from .scheduler import URGENT

# SMs that a prefill leaves to decode steps that are late. Measured, 8B shape, a 65,536-token prefill beside
# six sequences: without steps 3.81 s on all SMs and 4.18 with 8 kept; with 60 steps of 64 ms 4.61, and with 8
# kept and 60 steps of 52 ms 4.70. So they are kept only where steps would not be through with the prefill.
DECODE_SMS = 8


class Fetched:
    """A copy in host memory that may still be under way."""

    def __init__(self, source: torch.Tensor) -> None:
        on_gpu = source.is_cuda
        self.host = torch.empty_like(source, device="cpu", pin_memory=on_gpu)
        self.host.copy_(source, non_blocking=on_gpu)
        self.event = torch.cuda.current_stream(source.device).record_event() if on_gpu else None

    def here(self) -> bool:
        """Whether it has arrived."""
        return self.event is None or self.event.query()

    def wait(self) -> list[int]:
        """Its values, once they are here."""
        if self.event is not None:
            self.event.synchronize()
        values: list[int] = self.host.tolist()
        return values


class Lanes:
    """The streams of both and the events between them; nothing of it exists on a CPU."""

    def __init__(self, device: torch.device, decode_sms: int = DECODE_SMS) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: deque[torch.cuda.Event] = deque()
        if self.on_gpu:
            self.decode = torch.cuda.Stream(device, priority=URGENT)
            self.prefill = self.alone = torch.cuda.Stream(device)
            self.beside = (decode_sms and stream_beside(device, decode_sms)) or self.alone

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Work of decode steps."""
        if not self.on_gpu:
            yield
            return
        with torch.cuda.stream(self.decode):
            yield

    @contextmanager
    def prefilling(self, leave_sms: bool) -> Iterator[None]:
        """A newcomer's prefill, after the decode steps so far: they may have used the same rows.

        leave_sms: some are kept for the decode steps meanwhile.
        """
        if not self.on_gpu:
            yield
            return
        self.marks.clear()
        self.prefill = self.beside if leave_sms else self.alone
        self.prefill.wait_stream(self.decode)
        with torch.cuda.stream(self.prefill):
            yield

    def follow_caller(self) -> None:
        """Order the decode lane, and by it the other, after what the caller's stream has been given."""
        if self.on_gpu:
            self.decode.wait_stream(torch.cuda.current_stream())

    def mark(self) -> None:
        """Note that another chunk of the prefill has been launched."""
        if self.on_gpu:
            self.marks.append(self.prefill.record_event())

    def ahead(self) -> int:
        """Marks that the GPU has not reached yet."""
        while self.marks and self.marks[0].query():
            self.marks.popleft()
        return len(self.marks)

    def wait(self, ahead: int) -> None:
        """Hold the host until the GPU has no more than `ahead` marks before it."""
        while self.ahead() > ahead:
            self.marks[-1 - ahead].synchronize()

    def meet(self) -> None:
        """Order the decode steps to come after the prefill, its copies to host memory included."""
        if self.on_gpu:
            self.decode.wait_stream(self.prefill)
