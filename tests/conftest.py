"""Shared fixtures. Without a GPU the Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

# Read when triton is imported, so it is set before any test module imports a kernel.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
