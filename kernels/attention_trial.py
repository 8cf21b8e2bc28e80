"""Which prefill attention is fastest on this GPU at this shape: found by a trial, never assumed.

PyTorch's flash attention is always there and is what the others must agree with:
cuDNN, and FlashAttention 2 and 3 and FlashInfer where the user has them.
"""

import importlib
import importlib.util
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .split_attention import Attention, cudnn_attention, flash_attention

# Two kernels round softmax weights at other places: two roundings of the type at most, in the mean.
TRIAL_ROUNDINGS = 2
TIMED_RUNS = 3
# What an attention may fail with: no kernel for the shape, another signature, no compiler where it needs one.
REASONS = (
    RuntimeError,
    TypeError,
    ValueError,
    AssertionError,
    ImportError,
    OSError,
    subprocess.SubprocessError,
)
# Name -> (module, function) of packages that a user may have.
FLASH_ATTENTION = {
    "flash-attn-3": ("flash_attn_interface", "flash_attn_func"),
    "flash-attn-2": ("flash_attn", "flash_attn_func"),
}
FLASHINFER = ("flashinfer", "single_prefill_with_kv_cache")


def candidates() -> dict[str, Attention]:
    """Every attention there is here by name, flash first."""
    found: dict[str, Attention] = {"flash": flash_attention, "cudnn": cudnn_attention}
    for name, where in FLASH_ATTENTION.items():
        function = package_function(*where)
        if function is not None:
            found[name] = by_flash_attention(function)
    function = package_function(*FLASHINFER)
    if function is not None:
        found["flashinfer"] = by_flashinfer(function)
    return found


def package_function(module_name: str, name: str) -> Callable[..., Any] | None:
    """A function of an installed package, None where it cannot be imported."""
    try:
        if importlib.util.find_spec(module_name) is None:
            return None
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, OSError, AttributeError, RuntimeError):  # built for another torch or CUDA
        return None


def by_flash_attention(function: Callable[..., Any]) -> Attention:
    """FlashAttention's flash_attn_func; its causal mask is aligned to the last key."""

    def attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
        dim = query.shape[-1]
        keys, values = rows[None, :, :, :dim].transpose(1, 2), rows[None, :, :, dim : 2 * dim].transpose(1, 2)
        # [1, T, Hq, D] over [1, E, Hkv, D]
        out = function(query.transpose(1, 2), keys, values, softmax_scale=scale, causal=True)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)

    return attention


def by_flashinfer(function: Callable[..., Any]) -> Attention:
    """FlashInfer's single_prefill_with_kv_cache; its causal mask is aligned to the last key too.

    Nothing is merged, so its log-sum-exp, of base 2, is not asked for.
    """

    def attention(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
        dim = query.shape[-1]
        keys, values = rows[:, :, :dim], rows[:, :, dim : 2 * dim]  # [Hkv, E, D]
        queries = query[0].transpose(0, 1)  # [T, Hq, D]
        out = function(queries, keys, values, causal=True, kv_layout="HND", sm_scale=scale)
        return out.transpose(0, 1)[None]

    return attention


def try_all(
    attentions: Mapping[str, Attention],
    query: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    time: Callable[[Callable[[], object]], float],
) -> dict[str, float | str]:
    """Milliseconds of each attention on one problem, or in words why it is out.

    The first is the one that the others must agree with. time: milliseconds of a call.
    """
    expected: torch.Tensor | None = None
    results: dict[str, float | str] = {}
    for name, attention in attentions.items():
        try:
            got = attention(query, rows, scale).float()  # makes plans, compiles
            expected = got if expected is None else expected
            rounding = TRIAL_ROUNDINGS * torch.finfo(query.dtype).eps
            if not (got - expected).abs().mean() <= rounding * expected.abs().mean():  # NaN fails too
                results[name] = "disagrees with flash attention"
                continue
            results[name] = min(time(lambda: attention(query, rows, scale)) for _ in range(TIMED_RUNS))  # noqa: B023
        except torch.cuda.OutOfMemoryError:
            raise
        except REASONS as error:
            results[name] = str(error).strip().splitlines()[0] if str(error).strip() else "failed"
    return results


def event_ms(work: Callable[[], object]) -> float:
    """GPU milliseconds of a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
