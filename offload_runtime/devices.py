"""Which device a model goes to, and giving its memory back."""

import gc

import torch

from .errors import RunError


def choose_device(device: str) -> torch.device:
    """The torch device for "auto", "cuda", "cuda:1" or "cpu"."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RunError("no CUDA GPU is usable here; use --device cpu, or see `ds-offload doctor`")
    return place


def free_unused(device: torch.device, cycles: bool = True) -> None:
    """Give memory that nothing refers to back to the system, where the plan can count it.

    The matrix library's workspaces too: it keeps one for every stream that it has worked on.
    cycles: look for objects that refer to each other only, which takes 0.2 s beside an 8B model.
    """
    if cycles:
        gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
