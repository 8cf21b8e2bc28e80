"""Every kernel compiles to machine code for the GPUs we name, on a machine without any."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
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
