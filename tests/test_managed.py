"""Managed memory for rows: what the driver is asked for, machines without it, and that both sides see it."""

import ctypes
import gc
import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from offload_runtime import doctor_gpu
from offload_runtime.cache import managed
from offload_runtime.cache.row_memory import RowMemory
from offload_runtime.kernels.gather import gather_rows

CPU = torch.device("cpu")


class Location:
    type, id = None, None


class Driver:
    """What managed.py uses of cuda.bindings.driver, with plain memory behind it."""

    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS="shared")
    CUmemAttach_flags = SimpleNamespace(CU_MEM_ATTACH_GLOBAL=SimpleNamespace(value=1))
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_HOST="host", CU_MEM_LOCATION_TYPE_DEVICE="gpu")
    CUmem_advise = SimpleNamespace(
        CU_MEM_ADVISE_SET_PREFERRED_LOCATION="prefer", CU_MEM_ADVISE_SET_ACCESSED_BY="map"
    )
    CUmemLocation = Location

    def __init__(self, shared: int = 1, room: bool = True) -> None:
        self.shared, self.room = shared, room
        self.advice, self.freed, self.memory = [], [], {}

    def cuDeviceGet(self, index):
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, "context"

    def cuCtxSetCurrent(self, context):
        return (0,)

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, self.shared

    def cuMemAllocManaged(self, size, flags):
        if not self.room:
            return 2, None
        region = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(region))
        self.memory[address] = region
        return 0, address

    def cuMemAdvise(self, pointer, size, what, location):
        self.advice.append((what, location.type))
        return (0,)

    def cuMemFree(self, pointer):
        self.freed.append(pointer)
        return (0,)


def test_the_host_is_preferred_and_the_gpu_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(managed, "driver_bindings", lambda: driver)
    pages = managed.managed_pages(5 << 20, torch.device("cuda", 0))
    assert pages.nbytes == 5 << 20
    assert driver.advice == [("prefer", "host"), ("map", "gpu")]
    pages[:] = 7
    rows = torch.from_numpy(pages[:64])
    where = pages.ctypes.data
    del pages
    gc.collect()
    assert not driver.freed
    assert rows.sum() == 7 * 64
    del rows
    gc.collect()
    assert driver.freed == [where]


def test_machines_without_it_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managed, "driver_bindings", lambda: None)
    assert managed.managed_pages(100, torch.device("cuda", 0)) is None
    monkeypatch.setattr(managed, "driver_bindings", lambda: Driver(shared=0))
    assert managed.managed_pages(100, torch.device("cuda", 0)) is None


def test_the_doctor_says_which_memory_rows_are_in(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for driver, ok, says in (
        (Driver(), True, "managed"),
        (Driver(shared=0), False, "does not share"),
        (None, False, "pip install cuda-bindings"),
    ):
        for module in (managed, doctor_gpu):
            monkeypatch.setattr(module, "driver_bindings", lambda driver=driver: driver)
        finding = doctor_gpu.row_memory_finding(gpu)
        assert finding.ok is ok
        assert says in f"{finding.value} {finding.fix}"


def test_no_room_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managed, "driver_bindings", lambda: Driver(room=False))
    with pytest.raises(MemoryError, match=r"cannot manage 5\.00 GB of host memory") as refusal:
        managed.managed_pages(5 * 10**9, torch.device("cuda", 0))
    assert "\n" not in str(refusal.value)


def test_rows_of_a_cpu_are_themselves() -> None:
    rows = torch.zeros(2, 3)
    assert managed.gpu_alias(rows, CPU) is rows


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
def test_both_sides_see_the_same_rows(gpu: torch.device) -> None:
    rows = RowMemory(gpu).take((1, 2, 1000, 64), torch.bfloat16).result()
    assert not rows.is_pinned()  # it is managed here
    alias = managed.gpu_alias(rows, gpu)
    assert (alias.device, alias.shape, alias.data_ptr()) == (gpu, rows.shape, rows.data_ptr())
    values = torch.randn(1, 2, 1000, 64, dtype=torch.bfloat16, device=gpu)
    alias.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(rows, values.cpu())
    rows[:, 1, 17] = 5
    assert (alias[:, 1, 17] == 5).all()
    tokens = torch.arange(0, 1000, 3, dtype=torch.int32, device=gpu).expand(1, 2, -1).contiguous()
    places = torch.arange(tokens.shape[-1], dtype=torch.int32, device=gpu).expand(1, 2, -1).contiguous()
    counts = torch.full((1, 2), tokens.shape[-1], dtype=torch.int32, device=gpu)
    slots = torch.zeros(1, 2, tokens.shape[-1] + 4, 64, dtype=torch.bfloat16, device=gpu)
    gather_rows(rows, tokens, places, counts, slots, 4)
    assert torch.equal(slots[:, :, 4:].cpu(), rows[:, :, ::3])


@pytest.mark.gpu
def test_the_alias_keeps_the_memory(gpu: torch.device) -> None:
    memory = RowMemory(gpu)
    alias = managed.gpu_alias(memory.take((1 << 20,), torch.uint8).result(), gpu)
    gc.collect()
    assert memory.idle_bytes == 0
    alias.fill_(3)
    assert int(alias.long().sum()) == 3 << 20
    del alias
    gc.collect()
    assert memory.idle_bytes == 1 << 20


@pytest.mark.gpu
def test_copies_do_not_hold_the_host(gpu: torch.device) -> None:
    """A copy to it is queued behind work that is under way."""
    rows = RowMemory(gpu).take((1 << 20,), torch.uint8).result()
    alias, values = managed.gpu_alias(rows, gpu), torch.full((1 << 20,), 9, dtype=torch.uint8, device=gpu)
    torch.cuda._sleep(200_000_000)  # a tenth of a second and more
    event = torch.cuda.Event()
    alias.copy_(values, non_blocking=True)
    event.record()
    assert not event.query()
    event.synchronize()
    assert np.all(rows.numpy() == 9)
