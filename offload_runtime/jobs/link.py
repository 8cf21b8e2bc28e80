"""What the PCIe link carries right now, from NVML, for the progress display."""

import threading

POLL_SECONDS = 2.0  # NVML itself measures over 20 ms, and blocks that long
KB = 1e3  # NVML gives KB/s


class LinkRate:
    """GB/s into the first GPU, asked for in a thread of its own; None where NVML has no answer."""

    def __init__(self) -> None:
        self.gb_s: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._poll, name="link-rate", daemon=True)
        self.thread.start()

    def _poll(self) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            while not self.over.wait(POLL_SECONDS):
                rate = pynvml.nvmlDeviceGetPcieThroughput(handle, pynvml.NVML_PCIE_UTIL_RX_BYTES)
                self.gb_s = rate * KB / 1e9
        except pynvml.NVMLError:  # no GPU, no driver, or not told in this container
            self.gb_s = None

    def words(self) -> str:
        """ "link 21.3 GB/s", or nothing."""
        return "" if self.gb_s is None else f"link {self.gb_s:.1f} GB/s"

    def close(self) -> None:
        self.over.set()
        self.thread.join()
