"""The figures of a run: a summary, a table by layer, or JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .audit import audit_summary
from .errors import UserError
from .planner import GB, Plan

CHOICES = ("summary", "table", "json", "none")


def check_stats_choice(choice: str, file: Path | None) -> None:
    """UserError before anything is computed that could not be reported."""
    if choice not in CHOICES:
        raise UserError(f"--stats is {choice!r}; choose one of {', '.join(CHOICES)}")
    if file is None:
        return
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--stats-file {file} cannot be written: no writable folder {folder}")


def figures(stats: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The engine's figures with the plan's beside them. GB = 1e9 bytes."""
    return {
        **stats,
        "planned_gpu_peak_gb": plan.gpu_bytes / GB,
        "planned_pinned_gb": plan.needs.pinned / GB,
    }


def print_stats(result: dict[str, Any], choice: str, console: Console) -> None:
    """Print to stderr what --stats asks for; JSON is the last line."""
    if choice == "json":
        print(json.dumps(result), file=sys.stderr)
        return
    if choice == "table":
        console.print(layer_table(result["layers"]))
        if "audit" in result:
            console.print(audit_table(result["audit"]["layers"]))
    if choice != "none":
        for line in summary(result):
            console.print(line, style="dim", highlight=False, soft_wrap=True)


def summary(result: dict[str, Any]) -> list[str]:
    """Three lines: times, rows moved, memory; one more for an audit."""
    tpot = result["tpot_s"]
    rate = f", {1 / tpot:.1f} tokens/s" if tpot else ""
    times = (
        f"{result['prompt_tokens']} prompt + {result['new_tokens']} new tokens: "
        f"TTFT {result['ttft_s']:.2f} s, TPOT {1e3 * tpot:.1f} ms{rate}"
    )
    rows = (
        f"hit rate {percent(result['hit_rate'])}, prefetch recall {percent(result['prefetch_recall'])}, "
        f"{result['gather_gb']:.3f} GB of rows gathered from {result['placement']} memory"
    )
    prefill, decode = result["gpu_prefill_peak_gb"], result["gpu_decode_peak_gb"]
    gpu = "no GPU"
    if prefill is not None and decode is not None:
        planned = result["planned_gpu_peak_gb"]
        gpu = f"GPU peak {prefill:.2f} GB in prefill, {decode:.2f} GB in decode, planned {planned:.2f} GB"
    host = f"host rows {result['pinned_gb']:.2f} GB, planned {result['planned_pinned_gb']:.2f} GB"
    audit = [audit_summary(result["audit"])] if "audit" in result else []
    return [times, rows, f"{gpu}; {host}", *audit]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table("layer", "selected", "hits", "misses", "MB moved", "prefetch recall", title="rows by layer")
    for index, layer in enumerate(layers):
        counts = [str(layer[name]) for name in ("selected", "hits", "misses")]
        table.add_row(str(index), *counts, f"{layer['bytes'] / 1e6:.1f}", percent(layer["recall"]))
    return table


def audit_table(layers: list[dict[str, Any] | None]) -> Table:
    """Means over the audited steps; sliding layers are exact."""
    table = Table("layer", "% output error", "largest", "% mass missed", "largest", title="audit by layer")
    for index, layer in enumerate(layers):
        values = ["-"] * 4 if layer is None else [f"{100 * value:.2f}" for value in layer.values()]
        table.add_row(str(index), *values)
    return table
