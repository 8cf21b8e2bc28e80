"""Regions of host memory: lent, returned when no tensor uses them, lent again, freed for larger ones."""

import gc

import numpy as np
import pytest
import torch

from offload_runtime.cache import pinned, row_memory
from offload_runtime.cache.row_memory import RowMemory

from .models import offloaded, random_ids, random_llama

CPU = torch.device("cpu")


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def resident_kib(pages: np.ndarray) -> int:
    """Of a region's memory, what is there."""
    with open("/proc/self/smaps", encoding="utf-8") as maps:
        lines = maps.read().splitlines()
    start = pages.ctypes.data
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{start:x}-"))
    return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])


def test_a_region_comes_back_with_its_last_view() -> None:
    memory = RowMemory(CPU)
    first = memory.take((2, 3, 8), torch.bfloat16).result()
    assert (first.shape, first.dtype, memory.idle_bytes) == ((2, 3, 8), torch.bfloat16, 0)
    where, view = address(first), first[1]
    del first
    assert memory.idle_bytes == 0
    other = memory.take((2, 3, 8), torch.bfloat16).result()
    assert address(other) != where
    del view
    assert memory.idle_bytes == 96
    smaller = memory.take((5,), torch.float32).result()
    assert address(smaller) == where
    assert len(memory.regions) == 2


def test_prepared_regions_are_taken_in_order_and_none_is_made_twice() -> None:
    memory = RowMemory(CPU)
    memory.prepare(3, 4096)
    made = list(memory.regions)
    memory.prepare(3, 4000)  # what is there will do
    assert memory.regions == made
    lent = [memory.take((1024,), torch.float32).result() for _ in range(3)]
    assert len({address(tensor) for tensor in lent}) == 3
    assert memory.regions == made


def test_regions_that_are_filled_in_parts_serve_the_same_parts_only() -> None:
    memory, parts = RowMemory(CPU), ((0, 100), (500, 50))
    held = memory.take((1000,), torch.uint8, parts).result()
    where = address(held)
    del held
    assert memory.idle_bytes == 150
    again = memory.take((1000,), torch.uint8, parts).result()
    assert address(again) == where
    del again
    whole = memory.take((1000,), torch.uint8).result()
    assert [(region.nbytes, region.spans) for region in memory.regions] == [(1000, ())]
    del whole
    memory.take((900,), torch.uint8, ((0, 10),)).result()  # a whole one serves any part
    assert len(memory.regions) == 1


def test_only_the_parts_are_populated() -> None:
    pages = pinned.mapped(64 << 20)
    before = resident_kib(pages)
    pinned.populate(pages, ((3 << 20, 5 << 20), (40 << 20, 1)))
    kib = resident_kib(pages) - before
    assert 5 << 10 <= kib <= (5 << 10) + 3 * 2048  # pages of 2 MiB at the ends
    assert pinned.pieces(((5000, 40 << 20),)) == [
        (4096, 16 << 20), (4096 + (16 << 20), 16 << 20), (4096 + (32 << 20), (8 << 20) + 904),
    ]  # fmt: skip


def test_small_regions_make_way_for_larger_ones() -> None:
    memory = RowMemory(CPU)
    held = memory.take((10,), torch.uint8).result()
    del held
    larger = memory.take((20,), torch.uint8).result()
    assert [region.nbytes for region in memory.regions] == [20]
    memory.free()
    assert len(memory.regions) == 1
    del larger
    memory.free()
    assert memory.regions == []


def test_no_room_is_told_to_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, mapped = RowMemory(CPU), row_memory.mapped

    def no_room(_: int) -> None:
        raise MemoryError("cannot map 1.00 GB of host memory")

    monkeypatch.setattr(row_memory, "mapped", no_room)
    memory.prepare(2, 100)
    with pytest.raises(MemoryError, match="cannot map"):
        memory.take((100,), torch.uint8).result()
    with pytest.raises(MemoryError, match="cannot map"):
        memory.take((100,), torch.uint8).result()
    monkeypatch.setattr(row_memory, "mapped", mapped)
    assert memory.take((100,), torch.uint8).result().shape == (100,)


@pytest.mark.parametrize("flag", [pinned.MADV_POPULATE_WRITE, 12345])
def test_every_page_is_there_on_old_kernels_too(monkeypatch: pytest.MonkeyPatch, flag: int) -> None:
    """12345 is what a kernel does not know."""
    monkeypatch.setattr(pinned, "MADV_POPULATE_WRITE", flag)
    pages = pinned.mapped((40 << 20) + 5)
    pinned.populate(pages)
    assert resident_kib(pages) >= 40 << 10


def test_a_shorter_prompt_uses_the_memory_of_the_longer_one(device: str) -> None:
    model = random_llama(device=device)
    long, short = random_ids(1500, device=device), random_ids(90, seed=1, device=device)
    expected = offloaded(model, budget=24).generate(short, max_new_tokens=4, do_sample=False)
    with offloaded(model, budget=24) as runtime:
        runtime.generate(long, max_new_tokens=4, do_sample=False)
        capacity, regions = runtime._session.layout.capacity, list(runtime._memory.regions)
        assert torch.equal(runtime.generate(short, max_new_tokens=4, do_sample=False), expected)
        assert runtime._session.layout.capacity < capacity
        assert runtime._memory.regions == regions
        assert len(regions) == len(runtime._session.caches)
    gc.collect()
    assert runtime._memory.regions == []
