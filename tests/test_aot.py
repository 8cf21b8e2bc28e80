"""Every kernel compiles to machine code for the GPUs we name, on a machine without any."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from .aot_compile import added_unrounded

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_kernels_compile(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "aot_compile.py"), str(arch)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    if "unsupported" in result:
        pytest.skip(f"this Triton cannot build for sm_{arch}: {result['unsupported']}")
    assert result["failed"] == {}


def test_an_unrounded_product_added_to_another_lanes_number():
    sass = """
\tFMUL R7, R4, 1.4426950216293334961;
\tSHFL.BFLY PT, R8, R7, 0x8, 0x1f;
\tFFMA R9, R4, 1.4426950216293334961, R8;
\tFFMA R10, R8, R4, R11;
\tSHFL.BFLY PT, R8, R9, 0x4, 0x1f;
\t@P0 FADD R8, R9, R8;
\tFFMA R12, R4, R5, R8;
"""
    assert added_unrounded(sass.replace("\t", "--:-:1:-:4\t")) == ["FFMA R9, R4, 1.4426950216293334961, R8;"]


def test_every_launch_says_whether_products_are_fused():
    launches = {
        (path.stem, launch[1]): launch[2]
        for path in (ROOT / "kernels").glob("*.py")
        for launch in re.finditer(r"(\w*kernel)\[[^\n]*\]\((.*?)\n +\)", path.read_text(), re.DOTALL)
    }
    unfused = {name for name, arguments in launches.items() if "**UNFUSED" in arguments}
    assert unfused == {("combine_pieces", "_combine_kernel")}
    assert all("FUSED" in arguments for arguments in launches.values())
    assert len(launches) >= 18
