"""`ds-offload doctor`: what this machine offers and what is amiss, each line with its fix."""

import importlib.metadata
import importlib.util
import json
import platform
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from .console import table_console
from .doctor_gpu import gpu_findings
from .finding import Finding
from .memory import cgroup_limits, host_free_bytes

GB = 1e9
LIBRARIES = ("torch", "triton", "transformers", "safetensors", "numpy", "nvidia-ml-py")
CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def run_doctor(as_json: bool) -> None:
    """Print all findings; always exit code 0, a machine without a GPU is no failure."""
    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    table = Table("", "what", "found", "advice")
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[yellow]warn[/]"
        table.add_row(mark, finding.name, finding.value, finding.fix)
    table_console().print(table)


def examine() -> Iterator[Finding]:
    yield from gpu_findings()
    yield from host_findings()
    yield from library_findings()
    yield from kernel_findings()


def host_findings() -> Iterator[Finding]:
    """Memory, its limits, NUMA."""
    yield Finding("host memory free", f"{host_free_bytes() / GB:.1f} GB")
    limits = cgroup_limits()
    if limits:
        limit, used = min(limits, key=lambda pair: pair[0] - pair[1])
        yield Finding("container memory", f"limit {limit / GB:.1f} GB, {used / GB:.1f} GB used")
    else:
        yield Finding("container memory", "no limit")
    yield locked_memory()
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    fix = "bind to the GPU's node: numactl --cpunodebind=N --membind=N" if len(nodes) > 1 else ""
    yield Finding("NUMA nodes", str(len(nodes) or 1), fix=fix)


def locked_memory() -> Finding:
    """`ulimit -l`. CUDA pins through its driver, which on plain Linux does not count against it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("ulimit -l", "unlimited")
    note = "only if pinning fails: raise it (ulimit -l unlimited, docker --ulimit memlock=-1)"
    wsl = "microsoft" in platform.release().lower()
    return Finding("ulimit -l", f"{soft / 1024:.0f} KiB", not wsl, note)


def library_findings() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    for name in LIBRARIES:
        version = installed_version(name)
        fix = "" if version else f"pip install {name}"
        yield Finding(name, version or "not installed", version is not None, fix)


def kernel_findings() -> Iterator[Finding]:
    """Which kernels can run here."""
    from torch import cuda

    gpu, triton = cuda.is_available(), importlib.util.find_spec("triton") is not None
    if gpu and triton:
        yield Finding("Triton kernels", "usable")
    elif gpu:
        yield Finding("Triton kernels", "no triton", False, "pip install triton")
    else:
        yield Finding("Triton kernels", "no GPU: the torch references run instead")
    cupy = next((name for name in CUPY_PACKAGES if installed_version(name)), None)
    if cupy:
        yield Finding("CuPy", f"{cupy} {installed_version(cupy)}")
    else:
        yield Finding("CuPy", "not installed (optional)")


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
