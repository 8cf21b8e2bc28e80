"""Calls of the CUDA driver through cuda.bindings, which PyTorch's CUDA builds install."""

from typing import Any

import torch


def driver_bindings() -> Any | None:
    """The module, or None where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def result(answer: tuple[Any, ...], last: bool = False) -> Any:
    """What a driver call gives after its status, if anything; RuntimeError if that is not success."""
    if int(answer[0]) != 0:
        raise RuntimeError(f"CUDA driver: {answer[0]}")
    return answer[-1 if last or len(answer) == 1 else 1]


def enter_context(driver: Any, device: torch.device) -> None:
    """Let the calling thread use PyTorch's context of a GPU; runtime calls do it by themselves."""
    context = result(driver.cuDevicePrimaryCtxRetain(result(driver.cuDeviceGet(device.index or 0))))
    result(driver.cuCtxSetCurrent(context))
