"""What a result was measured on: GPU, driver, link, versions, commit. Goes into every JSON."""

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pynvml
import torch
import transformers
import triton

from offload_runtime import __version__

ROOT = Path(__file__).resolve().parent.parent
COMMIT_VARIABLE = "BENCH_COMMIT"  # names the commit where the checkout travels without its .git


def commit() -> str:
    """The commit of the checkout, with "-dirty" when files differ from it; the version where installed."""
    if COMMIT_VARIABLE in os.environ:
        return os.environ[COMMIT_VARIABLE]
    if not (ROOT / ".git").exists():
        return f"version {__version__}"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """GPU, driver, link (generation and width, now and at most), library versions, commit, date."""
    info: dict[str, Any] = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
    }
    if torch.cuda.is_available():
        info |= gpu_facts()
    return info


def gpu_facts() -> dict[str, Any]:
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return {
            "gpu": pynvml.nvmlDeviceGetName(handle),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "pcie_generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "pcie_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        }
    finally:
        pynvml.nvmlShutdown()
