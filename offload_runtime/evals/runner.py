"""The grid runner: every missing cell of models x settings x cases, each stored as soon as it is known."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli_progress import Working
from ..engine import OffloadedModel
from ..errors import RunError
from .cases import Case, Group, Groups, Tokens
from .eval_model import EvalModel
from .grid import Setting
from .records import Results, Row

# (model under one setting, group, the cases still to do) -> each case with its figures
Measure = Callable[[OffloadedModel, Group, Sequence[Case]], Iterator[tuple[Case, dict[str, Any]]]]


@dataclass(frozen=True)
class Report:
    """What a suite says about its rows: lines for the JSON file, a table, and the pictures it drew."""

    lines: list[dict[str, Any]]
    table: Table
    pictures: list[Path]


@dataclass(frozen=True)
class Suite:
    """groups: what is asked at a context length; measure: how; options: what else results depend on."""

    name: str
    groups: Groups
    measure: Measure
    report: Callable[[list[Row], Path], Report]  # (rows, output folder)
    options: dict[str, Any]
    chat: bool = False
    engine: tuple[tuple[str, Any], ...] = ()  # further settings of the runtime
    against_dense: bool = True  # whether dense attention is run as the reference


@dataclass(frozen=True)
class Work:
    """One group under one setting: the keys of its cases, and those that have no result yet."""

    model: EvalModel
    setting: Setting
    group: Group
    keys: tuple[str, ...]
    missing: tuple[Case, ...]


def plan_work(
    suite: Suite,
    models: Sequence[EvalModel],
    ctxs: Sequence[int],
    settings: Sequence[Setting],
    known: Results,
) -> list[Work]:
    """Everything that the grid asks for, done or not, in the order of the run."""
    works = []
    for model in models:
        tokens = Tokens(model.tokenizer, suite.chat)
        groups = [group for ctx in ctxs for group in suite.groups(tokens, ctx)]
        for setting in settings if suite.against_dense else settings[1:]:
            for group in groups:
                keys = group.keys(suite.name, f"{model.name} {model.hash}", setting, suite.options)
                missing = [c for c, key in zip(group.cases, keys, strict=True) if key not in known.rows]
                works.append(Work(model, setting, group, tuple(keys), tuple(missing)))
    return works


def run(suite: Suite, works: Sequence[Work], known: Results, console: Console) -> list[Row]:
    """Compute what is missing; returns the rows of the whole grid."""
    total = sum(len(work.missing) for work in works)
    have = sum(len(work.keys) for work in works) - total
    if have:
        console.print(f"{have} cells are there already, {total} to go", style="dim", highlight=False)
    done = 0
    with Working(console, suite.name) as bar:
        for model, parts in fitting(by_model(works), console):
            for (setting, _), mine in parts.items():
                need = max(work.group.tokens for work in mine)
                with model.open(setting, need, **dict(suite.engine)) as runtime:
                    for work in mine:
                        run_group(suite, runtime, work, known)
                        done += len(work.missing)
                        bar.update(done, total)
                        report(work, known, console)
            model.close()
    return known.select(key for work in works for key in work.keys)


Parts = dict[tuple[Setting, int], list[Work]]  # by setting and context length


def by_model(works: Sequence[Work]) -> list[tuple[EvalModel, Parts]]:
    """Unfinished work, by what has to be opened for it: new_rows may be a part of the context's budget."""
    models: dict[EvalModel, Parts] = {}
    for work in works:
        if work.missing:
            models.setdefault(work.model, {}).setdefault((work.setting, work.group.ctx), []).append(work)
    return list(models.items())


def fitting(models: Sequence[tuple[EvalModel, Parts]], console: Console) -> list[tuple[EvalModel, Parts]]:
    """Refuse, before any weights load, what has no room: RunError, or without dense if only that has none."""
    for model, parts in models:
        for setting, ctx in list(parts):
            try:
                model.check(setting, max(work.group.tokens for work in parts[setting, ctx]))
            except RunError as error:
                if not setting.is_dense:
                    raise
                console.print(
                    f"no dense reference for {model.name}: {error}", highlight=False, soft_wrap=True
                )
                del parts[setting, ctx]
    return list(models)


def run_group(suite: Suite, runtime: OffloadedModel, work: Work, known: Results) -> None:
    keys = {case.name: key for case, key in zip(work.group.cases, work.keys, strict=True)}
    labels = work.model.labels(work.setting)
    started = time.perf_counter()
    for case, figures in suite.measure(runtime, work.group, work.missing):
        now = time.perf_counter()
        known.add(
            {
                "key": keys[case.name],
                "suite": suite.name,
                "model": work.model.name,
                **work.setting.facts(),
                **labels,
                "task": work.group.task,
                "ctx": work.group.ctx,
                "case": case.name,
                **case.facts,
                **figures,
                "seconds": round(now - started, 3),
            }
        )
        started = now


def report(work: Work, known: Results, console: Console) -> None:
    """One line a group, for logs and for whoever waits."""
    scores = [row["score"] for row in known.select(work.keys) if "score" in row]
    mean = f": {sum(scores) / len(scores):.3f} of {len(scores)}" if scores else ""
    line = f"{work.model.name}  {work.setting.label}  {work.group.task} at {work.group.ctx}{mean}"
    console.print(line, style="dim", highlight=False, soft_wrap=True)
