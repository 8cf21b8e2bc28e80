"""A kernel's programs come before the kernel ahead of it has ended, and wait for that on the GPU.

Programmatic dependent launch (compute capability 9 and newer): starting a kernel and draining the one ahead
take a microsecond between any two that follow each other. Here a kernel's programs take their places as soon
as all of the one ahead have started and there is room, read what no kernel of a step writes (weights), and
wait for its end before they touch anything else. What they compute is the same. cluster.cuh and
cluster_launch.py have it for CUDA C++.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl


def early_launch(x: torch.Tensor) -> dict[str, Any]:
    """Options of the launch of a kernel on x's device that calls wait_for_inputs in every program."""
    options = launch_in_turn(x)
    return options | {"launch_pdl": True} if options["EARLY"] else options


def launch_in_turn(x: torch.Tensor) -> dict[str, Any]:
    """The same for a kernel that starts when what it waits for has ended, but lets the next start early."""
    return {"EARLY": x.is_cuda and _has_early_launch(x.device)}


@functools.cache
def _has_early_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Wait for all that the kernels ahead write and read; from then on the kernel behind may take places."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
