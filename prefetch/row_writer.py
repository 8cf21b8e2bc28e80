"""Prefill's way out: a layer's rows go to host memory on a copy stream while the GPU computes on."""

import torch


class RowWriter:
    """Copies pieces of one staging buffer to pinned host memory and guards their reuse.

    The staging buffer is one layer's rows. The next layer may overwrite a piece
    only after its copy: `before_reuse` makes the compute stream wait for that.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.copied: dict[int, torch.cuda.Event] = {}
        if self.on_gpu:
            self.stream = torch.cuda.Stream(device)

    def write(self, staged: torch.Tensor, host: torch.Tensor, start: int) -> None:
        """Copy staged [Hkv, T, row] to host [Hkv, T, row]; start names the piece."""
        if not self.on_gpu:
            host.copy_(staged)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for source, target in zip(staged, host, strict=True):  # each head's [T, row] is contiguous
                target.copy_(source, non_blocking=True)
            self.copied[start] = torch.cuda.Event()
            self.copied[start].record()

    def before_reuse(self, start: int) -> None:
        """Order the compute stream after the copy of the piece that began at `start`."""
        if start in self.copied:
            torch.cuda.current_stream().wait_event(self.copied.pop(start))

    def finish(self) -> None:
        """Order the compute stream after every copy."""
        for start in list(self.copied):
            self.before_reuse(start)
