"""The CUDA C++ kernels that run in thread block clusters, compiled for the CPU and run there as fibers.

What a GPU test finds on the GPU machine, these find anywhere there is g++, but for races, for the label
scores of tensor cores, and for time.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "emulated"
KERNELS = Path(__file__).parent.parent / "kernels"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@functools.cache
def build(name: str, defines: tuple[tuple[str, int], ...], sources: tuple[str, ...]) -> ctypes.CDLL:
    """A library with launch(backwards, grid y, grid z, the kernel's arguments ...), 1 if it ended."""
    text = (HERE / "runtime.h").read_text()
    text += "".join(f"#define {key} {value}\n" for key, value in defines)
    for source in sources:
        text += (HERE / source if source.endswith(".h") else KERNELS / source).read_text()
    text = re.sub(r"__shared__ (\w+) (\w+);", r"\1& \2 = static_shared<\1>();", text)
    text = text.replace(
        "extern __shared__ __align__(16) unsigned dynamic[];", "unsigned* dynamic = dynamic_shared();"
    )
    parameters = re.search(rf"\b{name}\((.*?)\) \{{", text, re.DOTALL)[1]
    names = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
    text += f"""
extern "C" int launch(int backwards, int grid_y, int grid_z, {parameters}) {{
    return run_clusters(grid_y, grid_z, CLUSTER, THREADS, backwards, [=] {{ {name}({names}); }});
}}
"""
    folder = Path(tempfile.mkdtemp())
    source, library = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(text)
    # Fibers jump between stacks, which a fortified longjmp takes for an error.
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def launch(
    library: ctypes.CDLL, grid_y: int, grid_z: int, *arguments: object, backwards: bool = False
) -> None:
    """Tensors go as pointers, numbers as 32-bit integers."""
    passed = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, torch.Tensor)
        else ctypes.c_int(int(argument))  # type: ignore[call-overload]
        for argument in arguments
    ]
    assert library.launch(int(backwards), grid_y, grid_z, *passed), "the kernel waits for what never comes"
