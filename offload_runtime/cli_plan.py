"""`ds-offload plan`: memory and predicted times of a run, from the model's config alone."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .calibration_file import own_calibration, with_choice
from .cli_exits import warn
from .cli_model import config_of, weights_of
from .config import STICKY_PART, make_config
from .console import table_console
from .doctor_gpu import copy_rate, gather_rate
from .errors import UserError
from .memory import FreeMemory, measure
from .model_check import check_config, check_label_channels, position_warning
from .model_source import ModelSource
from .planner import Plan, make_plan
from .speed import Rates, Times, Traffic, predict


@dataclass(frozen=True)
class PlanRequest:
    """What the command line asked for."""

    source: ModelSource
    settings: dict[str, Any]
    batch: int
    places: int | None
    gpu_gb: float | None
    host_gb: float | None
    miss_rate: float
    as_json: bool


def run_plan(request: PlanRequest) -> None:
    """Print the plan; a plan that does not fit is still an answer (exit code 0)."""
    source = request.source
    config = make_config(with_choice(request.settings, source.name_or_path, source.rope_scaling))
    if request.batch < 1:
        raise UserError(f"--batch is {request.batch}; it must be at least 1")
    if request.places is not None and (request.places < 1 or request.batch != 1):
        raise UserError("--places is a number of documents, at least 1, and goes without --batch")
    if not 0 <= request.miss_rate <= 1:
        raise UserError(f"--miss-rate is {request.miss_rate}; it must be between 0 and 1")
    model_config = config_of(source)
    shape = check_config(model_config)
    check_label_channels(config.label_channels, shape)
    warning = position_warning(config.ctx, shape)
    if warning:
        warn(warning)
    weights = weights_of(source, model_config)
    device = "cpu" if source.device == "cpu" else "cuda"
    dtype = getattr(torch, source.dtype) if source.dtype else None
    free = free_memory(request)
    plan = make_plan(
        config, model_config, free, device, batch=request.places or request.batch, dtype=dtype,
        weights=weights, continuous=request.places is not None,
    )  # fmt: skip
    rates = rates_here(source.device)
    traffic = Traffic(config.prefetch, config.entering(plan.layout.budget), request.miss_rate)
    own = own_calibration(source.name_or_path, source.rope_scaling)
    calibrated = own is not None if config.calibration is None else Path(config.calibration).is_file()
    times = predict(plan, weights, rates, traffic, calibrated) if device == "cuda" else None
    few = None
    if times is not None and traffic.new_rows is None:
        sticky = replace(config, new_rows=f"1/{STICKY_PART}").entering(plan.layout.budget)
        few = predict(plan, weights, rates, replace(traffic, new_rows=sticky), calibrated).offload_tpot
    if request.as_json:
        print(json.dumps(as_dict(plan, times, few, rates)))
        return
    print_tables(plan, times, few, rates, source.name_or_path)


def rates_here(device: str) -> Rates:
    """The default rates; the link's is measured where there is a GPU to measure it on."""
    rates = Rates()
    if device == "cpu" or not torch.cuda.is_available():
        return replace(rates, origin=f"{rates.origin}; the link's is assumed too, no GPU here")
    try:
        measured, gather = copy_rate(), gather_rate()
    except MemoryError as error:
        warn(f"the link's rate is assumed, not measured: {error}")
        return rates
    rates = replace(rates, prefill=replace(rates.prefill, cores=os.cpu_count() or 1))
    origin = f"{rates.origin}; but the link's, {measured / 1e9:.1f} GB/s by a copy here"
    return replace(rates, origin=origin, link_bytes_s=measured, gather=min(gather / measured, 1.0))


def free_memory(request: PlanRequest) -> FreeMemory:
    """What is free here, or what the user says is free on the machine planned for."""
    free = measure(request.source.device)
    if request.gpu_gb is not None:
        free = replace(free, gpu=int(request.gpu_gb * 1e9))
    if request.host_gb is not None:
        free = replace(free, host=int(request.host_gb * 1e9))
    return free


def print_tables(plan: Plan, times: Times | None, few: float | None, rates: Rates, name: str) -> None:
    """few: seconds a token where selection is exact but need not be."""
    console = table_console()
    table = Table("what", "size", title=f"{name}: {plan.batch} x {plan.tokens} tokens, budget {plan.budget}")
    for row in plan.lines():
        table.add_row(*row)
    console.print(table)
    if times is None:
        return
    speed = Table("predicted", "time", title="times by arithmetic, not measured")
    speed.add_row("TTFT", f"{times.ttft:.1f} s")
    speed.add_row("of it calibration on the prompt", f"{times.ttft_calibration:.1f} s")
    speed.add_row("of it computing", f"{times.ttft_compute:.1f} s")
    speed.add_row("of it waiting for row memory", f"{times.ttft_memory:.1f} s")
    words = {None: "", True: "", False: " (does not fit this GPU)"}
    dense, sparse = words[times.dense_fits], words[times.sparse_fits]
    speed.add_row("TPOT, all KV on the GPU, dense" + dense, f"{1e3 * times.dense_tpot:.1f} ms")
    speed.add_row("TPOT, all KV on the GPU, sparse" + sparse, f"{1e3 * times.sparse_tpot:.1f} ms")
    speed.add_row(f"TPOT, offloaded, {times.miss_rate:.0%} missed", f"{1e3 * times.offload_tpot:.1f} ms")
    if few is not None:
        speed.add_row(f"TPOT, offloaded, --new-rows 1/{STICKY_PART}", f"{1e3 * few:.1f} ms")
    console.print(speed)
    console.print(f"best here: {times.best}, {times.why}", highlight=False, soft_wrap=True)
    console.print(f"rates of {rates.origin}; other GPUs differ", style="dim", highlight=False, soft_wrap=True)


def as_dict(plan: Plan, times: Times | None, few: float | None, rates: Rates) -> dict[str, Any]:
    """Bytes, tokens and seconds. few: as print_tables has it."""
    return {
        "tokens": plan.tokens,
        "batch": plan.batch,
        "budget": plan.budget,
        "device": plan.device,
        "placement": plan.placement,
        "chunk_tokens": plan.chunk_tokens,
        "needs_bytes": asdict(plan.needs),
        "gpu_bytes": plan.gpu_bytes,
        "host_bytes": plan.host_bytes,
        "free_bytes": asdict(plan.free),
        "fits": plan.fits,
        "largest_ctx": plan.largest_ctx,
        "largest_budget": plan.largest_budget,
        "largest_batch": plan.largest_batch,
        "predicted_s": None if times is None else asdict(times),
        f"predicted_tpot_s_new_rows_1_{STICKY_PART}": few,
        "rates": asdict(rates),
    }
