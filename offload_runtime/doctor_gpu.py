"""The doctor's GPU lines: device, driver, link, and what the link really carries."""

from collections.abc import Callable, Iterator

import pynvml
import torch

from .cache.cuda_driver import driver_bindings
from .cache.managed import managed_available
from .cache.pinned import pinned_empty
from .cache.row_memory import RowMemory
from .finding import Finding
from .kernels.gather import gather_rows

GB = 1e9
COPY_BYTES = 256 << 20  # copies run at the link's speed from 16 MiB up (measured on an H100)
ROW_ELEMENTS = 256  # K and V of head_dim 128: 512 bytes in bfloat16
REGION_ROWS = 1 << 20  # 0.5 GB of rows, about one layer of one KV head group at 131,072 tokens
GATHER_ROWS = 1 << 17  # an eighth of them, as a selection of 1/8 would
REPEATS = 5
LOW_SHARE = 0.6  # below this part of the link's nominal rate a copy is suspicious; 0.79 is usual
LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.97e9, 5: 3.94e9, 6: 7.56e9}  # PCIe, per lane and way


def gpu_findings() -> Iterator[Finding]:
    """Findings on every GPU; one line when there is none."""
    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no GPU or no driver"
        fix = "decoding runs on the CPU, for tests only; on a GPU machine install a CUDA build of torch"
        yield Finding("GPU", f"none usable ({reason})", False, fix)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", f"{name}, {free / GB:.1f} of {total / GB:.1f} GB free")
    nominal = None
    for finding, rate in link_findings():
        nominal = rate or nominal
        yield finding
    yield from rate_findings(nominal)
    yield row_memory_finding(torch.device("cuda", torch.cuda.current_device()))


def link_findings() -> Iterator[tuple[Finding, float | None]]:
    """Driver and PCIe link of the current GPU through NVML, with the link's nominal bytes a second."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield Finding("NVML", str(error), False, "link and driver cannot be read"), None
        return
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        yield Finding("driver", pynvml.nvmlSystemGetDriverVersion()), None
        generation = pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)
        width = pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle)
        best = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        widest = pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        fix = "narrower than it could be: check slot, riser and BIOS" if width < widest else ""
        value = f"now gen {generation} x{width}, at most gen {best} x{widest} (an idle link slows down)"
        yield Finding("PCIe link", value, width >= widest, fix), LANE_BYTES_S.get(best, 0.0) * width or None
    except pynvml.NVMLError as error:
        yield Finding("PCIe link", f"not readable: {error}", False, "the link cannot be read"), None
    finally:
        pynvml.nvmlShutdown()


def rate_findings(nominal: float | None) -> Iterator[Finding]:
    """Measured rates of pinned copies and of the zero-copy gather."""
    try:
        host = pinned_empty((COPY_BYTES,), torch.uint8)
    except MemoryError as error:
        yield Finding("pinned memory", str(error), False, "raise ulimit -l or the container's memory limit")
        return
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    down = lambda: device.copy_(host, non_blocking=True)  # noqa: E731
    up = lambda: host.copy_(device, non_blocking=True)  # noqa: E731
    for name, copy in (("host to GPU, pinned copy", down), ("GPU to host, pinned copy", up)):
        yield judge(name, COPY_BYTES / seconds(copy), nominal)
    yield judge("zero-copy gather, 512-byte rows", gather_rate(), nominal)


def row_memory_finding(device: torch.device) -> Finding:
    """Which kind of host memory rows will be in."""
    if managed_available(device):
        return Finding("row memory", "managed by CUDA, mapped in pages of 2 MiB")
    fix = "this GPU does not share managed memory with the host"
    if driver_bindings() is None:
        fix = "pip install cuda-bindings, of the major version of torch.version.cuda"
    value = "registered pages: random rows out of more than 16 GB come up to a quarter slower"
    return Finding("row memory", value, False, fix)


def copy_rate() -> float:
    """Bytes a second of a copy from pinned host memory to the GPU; MemoryError when none can be pinned."""
    host = pinned_empty((COPY_BYTES,), torch.uint8)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    return COPY_BYTES / seconds(lambda: device.copy_(host, non_blocking=True))


def judge(name: str, rate: float, nominal: float | None) -> Finding:
    low = nominal is not None and rate < LOW_SHARE * nominal
    of = f" ({rate / nominal:.0%} of the link's {nominal / GB:.0f} GB/s)" if nominal else ""
    fix = "slow: bind to the GPU's NUMA node, and see what else uses the link" if low else ""
    return Finding(name, f"{rate / GB:.1f} GB/s{of}", not low, fix)


def gather_rate() -> float:
    """Bytes a second of ascending random rows brought by the runtime's own gather kernel."""
    memory = RowMemory(torch.device("cuda", torch.cuda.current_device()))
    rows = memory.take((1, 1, REGION_ROWS, ROW_ELEMENTS), torch.bfloat16).result()
    tokens = torch.randperm(REGION_ROWS)[:GATHER_ROWS].sort().values.int()
    places = torch.arange(GATHER_ROWS, dtype=torch.int32)
    tokens_gpu, places_gpu = (part.cuda()[None, None] for part in (tokens, places))  # [1, 1, rows]
    count = torch.full((1, 1), GATHER_ROWS, dtype=torch.int32, device="cuda")
    slots = torch.empty(1, 1, GATHER_ROWS, ROW_ELEMENTS, dtype=torch.bfloat16, device="cuda")
    took = seconds(lambda: gather_rows(rows, tokens_gpu, places_gpu, count, slots, 0))
    return GATHER_ROWS * ROW_ELEMENTS * rows.element_size() / took


def seconds(work: Callable[[], object]) -> float:
    """The fastest of a few runs after a warm-up, by CUDA events."""
    work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)
