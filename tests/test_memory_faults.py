"""Too little memory ends in one clear line, exit code 1, and leaves a runtime that works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_runtime import memory
from offload_runtime.cache import pinned, row_memory
from offload_runtime.errors import RunError
from offload_runtime.memory import FreeMemory, address_limit, host_free_bytes, limit_gpu

from .models import offloaded, random_ids, random_llama

ROOT = Path(__file__).resolve().parent.parent
# Child: a limit on address space of what the process has now and GIVEN bytes more, then the command line.
LIMITED = """
import resource, sys
import psutil, torch, transformers
from offload_runtime import cli_generate
from offload_runtime.cli import app
more = int(sys.argv[1])
size = psutil.Process().memory_info().vms + more
resource.setrlimit(resource.RLIMIT_AS, (size, size))
if sys.argv[2] == "late":  # the plan finds plenty, as where something else takes the memory afterwards
    from offload_runtime import cli_model, fitting, memory
    cli_model.measure = fitting.measure = lambda *_: memory.FreeMemory(10**15)
app(sys.argv[3:], standalone_mode=True)
"""


@pytest.mark.parametrize(("when", "says"), [("early", "GB are free"), ("late", "host memory")])
def test_address_space_limit(when: str, says: str) -> None:
    """`ulimit -v`: the plan counts it; where an allocation fails all the same, that is one line too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(600 << 20), when]
    command += ["generate", "--prompt", "a word " * 100, "--device", "cpu", "--ctx", "262144"]
    command += ["--max-new-tokens", "200000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ds-offload: ")]
    assert done.returncode == 1, done.stderr
    assert len(errors) == 1, done.stderr
    assert says in errors[0]
    assert "Traceback" not in done.stderr


def test_address_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_free_bytes() > 0
    used = memory.psutil.Process().memory_info().vms
    monkeypatch.setattr(memory.resource, "getrlimit", lambda _: (used + 1000, used + 1000))
    assert address_limit()[0][0] == used + 1000
    assert host_free_bytes() <= 1000


def test_the_next_call_works_after_rows_had_no_room(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    runtime, ids = offloaded(random_llama(device=device)), random_ids(90, device=device)
    expected = runtime.generate(ids, max_new_tokens=3, do_sample=False)
    mapped, managed_pages = row_memory.mapped, row_memory.managed_pages

    def no_room(*_: object) -> None:
        raise MemoryError("CUDA cannot pin 1.07 GB of host memory")

    runtime.close()
    monkeypatch.setattr(row_memory, "mapped", no_room)
    monkeypatch.setattr(row_memory, "managed_pages", no_room)
    with pytest.raises(MemoryError, match="cannot pin"):
        runtime.generate(ids, max_new_tokens=3, do_sample=False)
    assert runtime._session is None
    monkeypatch.setattr(row_memory, "mapped", mapped)
    monkeypatch.setattr(row_memory, "managed_pages", managed_pages)
    assert torch.equal(runtime.generate(ids, max_new_tokens=3, do_sample=False), expected)


def test_gpu_memory_setting_is_checked() -> None:
    from offload_runtime import RuntimeConfig
    from offload_runtime.errors import UserError

    with pytest.raises(UserError, match="gpu_memory is 0"):
        RuntimeConfig(gpu_memory=0)
    limit_gpu("cpu", 24)  # nothing to limit


@pytest.mark.gpu
def test_a_small_card_is_emulated_by_a_setting() -> None:
    """What does not fit is refused in one line, what fits runs, and memory stays below the limit."""
    model = random_llama(device="cuda")
    held = torch.cuda.memory_reserved()
    try:
        runtime = offloaded(model, ctx=200_000, budget="1/1", gpu_memory=(held + 1e9) / 1e9)
        with pytest.raises(RunError, match="of GPU memory") as refusal:
            runtime.generate(random_ids(190_000, device="cuda"), max_new_tokens=1)
        assert "\n" not in str(refusal.value)
        runtime = offloaded(model, budget=24, gpu_memory=(held + 2e9) / 1e9)
        runtime.generate(random_ids(2000, device="cuda"), max_new_tokens=4, do_sample=False)
        assert torch.cuda.max_memory_reserved() <= held + 2e9
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_memory_taken_after_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own error, which the command line turns into a line; the next call works."""
    from offload_runtime import fitting

    runtime, ids = offloaded(random_llama(device="cuda"), budget="1/1"), random_ids(300, device="cuda")
    expected = runtime.generate(ids, max_new_tokens=3, do_sample=False)
    runtime.close()
    monkeypatch.setattr(fitting, "measure", lambda _: FreeMemory(10**15, 10**15))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        with pytest.raises((RunError, torch.cuda.OutOfMemoryError)):
            runtime.generate(random_ids(4000, device="cuda"), max_new_tokens=3, do_sample=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(runtime.generate(ids, max_new_tokens=3, do_sample=False), expected)


class RefusingRuntime:
    """libcudart of a machine that locks no more pages."""

    def cudaHostRegister(self, *_: int) -> int:
        return 2


def test_no_page_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ulimit -l` and the like: the message names what to check."""
    monkeypatch.setattr(pinned.torch.cuda, "cudart", RefusingRuntime)
    with pytest.raises(MemoryError, match=r"cannot pin 0\.00 GB.*ulimit -l") as refusal:
        pinned.pinned_empty((4, 1000), torch.float32)
    assert "\n" not in str(refusal.value)
    with pytest.raises(MemoryError, match="cannot map"):
        pinned.pinned_empty((1 << 50,), torch.float32)
