"""What reaches the driver's launch call, read back by a stand-in for it."""

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from offload_runtime.kernels import driver_launch
from offload_runtime.kernels.driver_launch import PROGRAMMATIC_STREAM_SERIALIZATION, LaunchConfig

KERNEL = SimpleNamespace(kernel=SimpleNamespace(ptr=2**40 + 5))


class Driver:
    """Remembers one launch."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuLaunchKernelEx(self, config, function, places, extra):
        self.config: LaunchConfig = config._obj
        attributes = ctypes.cast(
            self.config.attributes, ctypes.POINTER(driver_launch.LaunchAttribute * 1)
        ).contents
        self.attributes = [(a.id, a.value[0]) for a in attributes[: self.config.attribute_count]]
        kinds = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int)
        pairs = zip(kinds, places, strict=True)
        self.numbers = [ctypes.cast(place, ctypes.POINTER(kind)).contents.value for kind, place in pairs]
        self.function, self.extra = function.value, extra
        return self.status


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)

    def run(status=0, **options):
        driver = Driver(status)
        monkeypatch.setattr(driver_launch, "driver", lambda: driver)
        arguments = (ctypes.c_void_p(2**45), ctypes.c_longlong(-(2**33)), ctypes.c_int(-3))
        place = ((8, 2, 3), (64, 1, 1), 1024, arguments, torch.device("cuda", 1))
        driver_launch.launch_kernel(KERNEL, *place, **options)
        return driver

    return run


def test_sizes_stream_and_arguments(launch):
    driver = launch()
    config = driver.config
    assert (list(config.grid), list(config.block), config.shared_bytes) == ([8, 2, 3], [64, 1, 1], 1024)
    assert config.stream == 77
    assert driver.numbers == [2**45, -(2**33), -3]
    assert (driver.function, driver.extra) == (2**40 + 5, None)
    assert driver.attributes == []


def test_an_early_start_is_an_attribute(launch):
    assert launch(early=True).attributes == [(PROGRAMMATIC_STREAM_SERIALIZATION, 1)]


def test_a_refused_launch_is_an_error(launch):
    with pytest.raises(RuntimeError, match="error 701"):
        launch(status=701)
