"""The stream that leaves SMs to others."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import smid

from offload_runtime.prefetch.green_stream import make_stream, stream_beside

KEPT = 8


class Driver:
    """What make_stream uses of cuda.bindings.driver, on a GPU of 20 SMs; `fails` names a call that fails."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def _answer(self, call: str, *values):
        return (801 if call == self.fails else 0, *values)

    def cuDeviceGet(self, index):
        return self._answer("cuDeviceGet", f"device {index}")

    def cuDeviceGetDevResource(self, device, kind):
        return self._answer("cuDeviceGetDevResource", 20)

    def cuDevSmResourceSplitByCount(self, groups, whole, flags, count):
        return self._answer("cuDevSmResourceSplitByCount", [count] * groups, groups, whole - groups * count)

    def cuDevResourceGenerateDesc(self, resources, count):
        return self._answer("cuDevResourceGenerateDesc", tuple(resources))

    def cuGreenCtxCreate(self, described, device, flags):
        return self._answer("cuGreenCtxCreate", sum(described))

    def cuGreenCtxStreamCreate(self, context, flags, priority):
        return self._answer("cuGreenCtxStreamCreate", 1000 + context)


def test_the_stream_is_on_the_sms_that_are_not_kept():
    assert make_stream(Driver(), 0, KEPT) == 1000 + 20 - KEPT


@pytest.mark.parametrize(
    "call", ["cuDeviceGetDevResource", "cuDevSmResourceSplitByCount", "cuGreenCtxCreate"]
)
def test_a_driver_that_refuses_is_an_error_here(call):
    with pytest.raises(RuntimeError, match="801"):
        make_stream(Driver(call), 0, KEPT)


@triton.jit
def _note_sm(seen, LOOPS: tl.constexpr):
    sm = smid()
    total = 0.0
    for i in range(LOOPS):
        total += tl.sqrt(i + total)
    tl.store(seen + sm, 1 + (total < 0).to(tl.int32))


@pytest.mark.gpu
def test_kernels_on_it_keep_off_the_kept_sms():
    device = torch.device("cuda", 0)
    stream = stream_beside(device, KEPT)
    assert stream is not None
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    everywhere, beside = (torch.zeros(256, dtype=torch.int32, device=device) for _ in range(2))
    _note_sm[(64 * sms,)](everywhere, LOOPS=1000)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        _note_sm[(64 * sms,)](beside, LOOPS=1000)
    torch.cuda.synchronize()
    assert int(everywhere.sum()) == sms
    assert 0 < int(beside.sum()) <= sms - KEPT
