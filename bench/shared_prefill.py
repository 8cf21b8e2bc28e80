"""One prefill, asked under many budgets: what makes a grid at 262,144 tokens cost minutes.

A budget decides what decoding selects and nothing about the caches' content, so
the caches are made for budget 1/1 (a slot for every row) and only the number in
GPU memory that says K changes between questions. Answers are those of caches made
for the smaller budget up to the order of sums (attention is split by the size of
its buffers); transfers and times are not, so none are reported from here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from offload_runtime.engine import OffloadedModel
from offload_runtime.evals.cases import Case, Group
from offload_runtime.evals.grid import Setting
from offload_runtime.evals.records import Results

EVERYTHING = "1/1"

# (runtime whose caches hold the group's prefix, group, one case) -> its figures
Look = Callable[[OffloadedModel, Group, Case], dict[str, Any]]


class SharedPrefill:
    """A runtime made for budget 1/1 that answers under any budget.

    apart: a prefill and caches for each budget instead, as tests compare it with.
    least: tokens that caches have room for at least, so that groups of any length share one CUDA graph.
    """

    def __init__(self, runtime: OffloadedModel, apart: bool = False, least: int = 0) -> None:
        self.runtime, self.apart, self.least = runtime, apart, least
        self.config = replace(runtime.config, budget=EVERYTHING)
        self.prefix: torch.Tensor | None = None

    @torch.no_grad()
    def hold(self, group: Group, case: Case) -> None:
        """Have the tokens in front of the question in caches with room for the group's longest one."""
        prefix = group.prefix if len(group.prefix) else case.ids
        if self.apart or (self.prefix is not None and torch.equal(self.prefix, prefix)):
            return
        self.use(EVERYTHING)
        if self.runtime._session is not None:
            self.runtime._session.clear()
        ids, room = prefix.to(self.runtime.model.device), group.tokens - len(prefix)
        self.runtime._open_session([ids], max(room, self.least - len(ids))).prefill([ids], room)
        self.prefix = prefix

    def use(self, budget: str) -> None:
        """Select as many tokens as this budget says from the next question on."""
        self.runtime.config = replace(self.config, budget=budget)
        session = self.runtime._session
        if session is not None and self.apart:
            self.runtime._session = None
        elif session is not None:
            session.config = replace(session.config, budget=budget)


@dataclass(frozen=True)
class Job:
    """One group's cases under one kind of label and several budgets, dense among them or not."""

    suite: str
    group: Group
    settings: tuple[Setting, ...]
    look: Look
    options: dict[str, Any]


def open_runtime(
    base: OffloadedModel, setting: Setting, ctx: int, calibration: Any, **more: Any
) -> SharedPrefill:
    """Another runtime on the same weights, for one kind of label.

    As many new rows enter a step under every budget as under the setting's own.
    """
    config = setting.config(ctx, seed=0, **more)
    new_rows = config.entering(config.budget_tokens(ctx))
    config = replace(config, budget=EVERYTHING, new_rows=new_rows)
    return SharedPrefill(OffloadedModel(base.model, config, base.tokenizer, calibration))


def run_job(job: Job, shared: SharedPrefill, model: str, known: Results, until: float) -> bool:
    """Every case under every setting that has no row yet, case by case; False when time ran out."""
    keys = {setting: job.group.keys(job.suite, model, setting, job.options) for setting in job.settings}
    for index, case in enumerate(job.group.cases):
        for setting in job.settings:
            key = keys[setting][index]
            if key in known.rows:
                continue
            if time.monotonic() > until:
                return False
            started = time.perf_counter()
            shared.hold(job.group, case)
            shared.use(setting.budget)
            row = {
                "key": key, "suite": job.suite, "model": model, **setting.facts(), "task": job.group.task,
                "ctx": job.group.ctx, "case": case.name, **case.facts,
            }  # fmt: skip
            figures = job.look(shared.runtime, job.group, case)
            known.add(row | figures | {"seconds": round(time.perf_counter() - started, 3)})
    return True


def of_suite(known: Results, suite: str) -> list[dict[str, Any]]:
    return [row for row in known.rows.values() if row["suite"] == suite]
