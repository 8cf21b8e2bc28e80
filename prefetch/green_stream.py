"""A stream whose kernels leave some SMs to others: a CUDA green context over the rest of the GPU.

Stream priorities alone do not let a decode step through: attention over a long
prompt keeps an SM busy for about a millisecond a block, and every small kernel of the
step waits for one to end (measured: 50 ms a step beside a 65,536-token prefill of the 8B
shape, 30 with SMs of its own, 12 alone).
"""

import logging
from typing import Any

import torch

from ..cache.cuda_driver import driver_bindings, result

log = logging.getLogger(__name__)


def stream_beside(device: torch.device, kept_sms: int) -> torch.cuda.Stream | None:
    """A stream on all SMs but at least `kept_sms`, which the driver rounds up; None where it cannot be had.

    Needs cuda.bindings, which torch installs, and a driver that knows CUDA 12.4. The context
    lives as long as the process: torch's allocator keeps memory by stream.
    """
    driver = driver_bindings()
    if driver is None:
        log.info("no cuda.bindings: decode steps share all SMs with prefills")
        return None
    try:
        return torch.cuda.ExternalStream(make_stream(driver, device.index or 0, kept_sms), device)
    except RuntimeError as error:
        log.info("no green context, decode steps share all SMs with prefills: %s", error)
        return None


def make_stream(driver: Any, device_index: int, kept_sms: int) -> int:
    """The handle of a non-blocking stream in a green context over what a split of the SMs leaves over."""
    device = result(driver.cuDeviceGet(device_index))
    whole = result(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    # Gives one group of kept_sms SMs, which clusters can be placed on, a count, and the rest.
    rest = result(driver.cuDevSmResourceSplitByCount(1, whole, 0, kept_sms), last=True)
    described = result(driver.cuDevResourceGenerateDesc([rest], 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = result(driver.cuGreenCtxCreate(described, device, flags))
    return int(
        result(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
    )
