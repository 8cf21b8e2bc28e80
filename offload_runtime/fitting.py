"""Refuse what cannot fit before it is loaded or allocated, or shrink settings until it does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from .adapter import ModelAdapter
from .cache.layout import KVLayout
from .config import LABEL_BITS, RuntimeConfig
from .memory import measure
from .planner import SMALLEST_CTX, Plan, largest, make_plan, require
from .weights import loaded_weights

# Where shrinking the budget stops: 64 rows a KV head take 8 MB of slots in the Llama-3.1-8B shape
# (arithmetic), so less frees nothing and only loses text quality.
LEAST_BUDGET = 64

PlanOf = Callable[[RuntimeConfig], Plan]


def fit(config: RuntimeConfig, plan_of: PlanOf) -> tuple[RuntimeConfig, list[str]]:
    """Shrink slots, then label bits, then the budget until the plan fits; one line for each change.

    RunError, as without fitting, when even the least of all three does not fit.
    """
    plan = plan_of(config)
    if plan.fits:
        return config, []
    slots, budget = plan.layout.slots, plan.budget
    if not plan_of(smallest(config, min(LEAST_BUDGET, budget))).fits:
        require(plan)
    # A layout's budget follows its capacity, so a fraction may select a little more than plan.budget.
    config = replace(config, slots=max(plan.layout.budget, fitting_slots(config, plan, plan_of)))
    notes = [f"slots lowered from {slots} to {config.slots} to fit; more rows will be fetched"]
    if config.slots == slots:
        notes = []
    for bits in sorted((b for b in LABEL_BITS if b < config.label_bits), reverse=True):
        if plan_of(config).fits:
            break
        notes.append(f"label bits lowered from {config.label_bits} to {bits} to fit; selection is coarser")
        config = replace(config, label_bits=bits)
    if not plan_of(config).fits:
        least, config = min(LEAST_BUDGET, budget), replace(config, slots=1)  # as many slots as the budget
        count = largest(lambda k: plan_of(replace(config, budget=k)).fits, least, budget)
        notes.append(f"budget lowered from {budget} to {count} to fit; fewer tokens are attended to")
        config = replace(config, budget=count)
    return config, notes


def shrunk(config: RuntimeConfig) -> dict[str, Any]:
    """The settings that fit() may have changed; none when it was not asked to."""
    names = ("slots", "label_bits", "budget") if config.fit else ()
    return {name: getattr(config, name) for name in names}


def smallest(config: RuntimeConfig, budget: int) -> RuntimeConfig:
    return replace(config, slots=1, label_bits=min(LABEL_BITS), budget=budget)


def fitting_slots(config: RuntimeConfig, plan: Plan, plan_of: PlanOf) -> int:
    """The most slots that fit, 0 when not even one for each selected token does."""
    return largest(lambda n: plan_of(replace(config, slots=n)).fits, plan.layout.budget, plan.layout.slots)


def plan_session(
    config: RuntimeConfig,
    adapter: ModelAdapter,
    batch: int,
    capacity: int,
    idle_host_bytes: int = 0,
    continuous: bool = False,
    place_tokens: tuple[int, ...] = (),
) -> tuple[RuntimeConfig, KVLayout, list[str]]:
    """A session's config, its placement and chunk decided, its layout, and what was shrunk.

    RunError if it does not fit. The model is loaded already, so its weights are part of what is
    not free. idle_host_bytes: in use, but for this session to take or to free. continuous and
    place_tokens: as in make_plan.
    """
    free, loaded = measure(str(adapter.device)), loaded_weights(adapter.model)
    free = replace(free, host=free.host + idle_host_bytes)

    def plan_of(trial: RuntimeConfig) -> Plan:
        return make_plan(
            trial, adapter.model.config, free, adapter.device.type,
            tokens=capacity, batch=batch, dtype=adapter.dtype, weights=loaded,
            continuous=continuous, place_tokens=place_tokens,
        )  # fmt: skip

    notes: list[str] = []
    if config.fit:
        config, notes = fit(config, plan_of)
    plan = plan_of(config)
    require(plan)
    return replace(config, placement=plan.placement, chunk_tokens=plan.chunk_tokens), plan.layout, notes


def require_weights(
    model_config: PretrainedConfig,
    config: RuntimeConfig,
    place: torch.device,
    dtype: str | torch.dtype | None,
) -> None:
    """RunError before weights are loaded that leave no room for even the shortest context."""
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    least = replace(smallest(config, 1), placement="host")
    free = measure(str(place))
    require(
        make_plan(least, model_config, free, place.type, tokens=min(SMALLEST_CTX, config.ctx), dtype=dtype)
    )
