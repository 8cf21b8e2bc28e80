"""The mark of tests that run CUDA C++ kernels: they need a GPU of sm_90 or newer, and CuPy."""

import importlib.util

import pytest
import torch


def missing() -> str:
    """Why those kernels cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy (the extra cuda12 or cuda13)"
    if torch.cuda.get_device_capability()[0] < 9:
        return "needs thread block clusters and the bulk copy engine (sm_90)"
    return ""


needs_hopper = pytest.mark.skipif(bool(missing()), reason=missing() or "runs")
