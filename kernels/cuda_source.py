"""CUDA C++ compiled at run time through CuPy (the extras cuda12 and cuda13): where it can be, and how."""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def runs_hopper_source(device: torch.device) -> bool:
    """Whether CuPy is here and the device has clusters and the bulk copy engine (sm_90 and newer)."""
    return device.type == "cuda" and has_cupy() and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


def shared_limit(device: torch.device) -> int:
    """Shared memory that one CTA may have, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def compile_source(names: tuple[str, ...], function: str, defines: Mapping[str, int]) -> Any:
    """A kernel from files beside this one, taken as one text in this order; CuPy caches it on disk."""
    import cupy

    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))
    source = "".join(Path(__file__).with_name(name).read_text() for name in names)
    return cupy.RawModule(code=source, options=options).get_function(function)
