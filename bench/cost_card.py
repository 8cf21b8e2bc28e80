"""What one decode step has to move, by arithmetic, and the least time that takes at measured rates."""

from dataclasses import dataclass
from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.timing import hbm_copy_gb_s, hbm_read_gb_s, pinned_copy_gb_s
from offload_runtime.config import DEFAULT_LABEL_CHANNELS, RuntimeConfig
from offload_runtime.layouts import make_layout
from offload_runtime.weights import expert_share

GB = 1e9


@dataclass(frozen=True)
class Ceilings:
    """Measured GB/s: a pinned copy to the GPU, and the best of a copy within and a sum over GPU memory."""

    link_gb_s: float | None
    hbm_gb_s: float | None


def measure_ceilings(device: torch.device) -> Ceilings:
    """None where there is no GPU and so neither link nor HBM."""
    if device.type != "cuda":
        return Ceilings(None, None)
    return Ceilings(round(pinned_copy_gb_s(), 2), round(max(hbm_copy_gb_s(), hbm_read_gb_s()), 1))


def weight_bytes(adapter: ModelAdapter) -> int:
    """Weights that a token's step reads: all but the embedding table, and of experts those it visits."""
    share = expert_share(adapter.model.config)
    table, head = adapter.model.get_input_embeddings(), adapter.model.get_output_embeddings()
    total = 0
    for name, parameter in adapter.model.named_parameters():
        if parameter is table.weight and parameter is not head.weight:
            continue
        total += int(parameter.nbytes * (share if ".experts." in name else 1))
    return total


def cost_card(
    adapter: ModelAdapter, shape: str, ctx: int, batch: int, budgets: list[str], ceilings: Ceilings
) -> dict[str, Any]:
    """Bytes a step of dense decode and of every budget, rows counted as if none were resident.

    The floor of a step is the longer of its HBM bytes and its link bytes, each at its ceiling.
    """
    weights = weight_bytes(adapter)
    lines = []
    kv_bytes = 0
    for budget in budgets:
        layout = make_layout(
            adapter.shape, RuntimeConfig(ctx=ctx, budget=budget), DEFAULT_LABEL_CHANNELS, batch, ctx
        )
        kv_bytes = layout.layers * layout.host_bytes
        rows = layout.layers * layout.heads * layout.budget * layout.row_bytes
        labels = layout.layers * layout.label_bytes
        hbm_ms = milliseconds(weights + labels + rows, ceilings.hbm_gb_s)
        link_ms = milliseconds(rows, ceilings.link_gb_s)
        lines.append(
            {"budget": budget, "budget_tokens": layout.budget, "labels_gb": labels / GB, "rows_gb": rows / GB,
             "hbm_ms": hbm_ms, "link_ms": link_ms, "floor_ms": longer(hbm_ms, link_ms)}
        )  # fmt: skip
    return {
        "shape": shape, "ctx": ctx, "batch": batch, "dtype": str(adapter.dtype).removeprefix("torch."),
        "weights_gb": weights / GB, "kv_gb": kv_bytes / GB,
        "link_gb_s": ceilings.link_gb_s, "hbm_gb_s": ceilings.hbm_gb_s,
        "dense_floor_ms": milliseconds(weights + kv_bytes, ceilings.hbm_gb_s),
        "streaming_floor_ms": milliseconds(kv_bytes, ceilings.link_gb_s),
        "budgets": lines,
    }  # fmt: skip


def milliseconds(size: float, gb_s: float | None) -> float | None:
    return None if gb_s is None else size / gb_s / 1e6


def longer(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else max(first, second)
