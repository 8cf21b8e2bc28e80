"""`ds-offload eval`: run a suite over a grid of settings; results, table and pictures go to --out."""

import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from .cli_generate import check_file
from .cli_progress import quiet_unless_terminal
from .engine import choose_device
from .errors import UserError
from .evals.eval_model import EvalModel
from .evals.grid import make_grid, words
from .evals.plots import pyplot
from .evals.quality import write_choice
from .evals.records import Results, make_folder
from .evals.runner import plan_work, run
from .evals.suites import Wanted, choose, lengths
from .json_file import write_json
from .model_source import ModelSource

LOG_COLUMNS = 140  # of a table that goes to a file or a pipe


@dataclass(frozen=True)
class EvalRequest:
    """What the command line asked for, by its options' names; lists are still comma-separated text."""

    suite: str
    source: ModelSource  # how every model is loaded
    model: str | None
    ctx: str
    budget: str
    channels: str | None
    label_bits: str
    prefetch: str
    new_rows: str
    calibration: str | None
    calibrate_on: list[Path]
    out: Path
    quality: float | None
    wanted: Wanted


def run_eval(request: EvalRequest) -> None:
    """Check, compute what is missing, then write OUT/SUITE.jsonl, SUITE.json and the pictures."""
    settings = make_grid(
        request.budget, request.channels, request.label_bits, request.prefetch, request.new_rows
    )
    ctxs = lengths(request.ctx)
    suite = choose(request.suite, request.wanted)
    check_quality(request)
    choose_device(request.source.device)
    for file in request.calibrate_on:
        check_file(str(file), "--calibrate-on")
    if request.calibration is not None:
        check_file(request.calibration, "--calibration")
    pyplot()  # better to miss it now than after hours
    make_folder(request.out)
    known = Results(request.out / f"{suite.name}.jsonl")
    models = open_models(request)
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=LOG_COLUMNS)
    quiet_unless_terminal()
    works = plan_work(suite, models, ctxs, settings, known)
    if not works:
        raise UserError(f"no case fits into --ctx {request.ctx}; raise it or give shorter cases")
    report = suite.report(run(suite, works, known, console), request.out)
    summary = request.out / f"{suite.name}.json"
    write_json(summary, {"suite": suite.name, **versions(), "lines": report.lines})
    console.print(report.table)
    for file in (known.file, summary, *report.pictures):
        console.print(f"wrote {file}", style="dim", highlight=False, soft_wrap=True)
    if request.quality is not None:
        for model in models:
            mine = [line for line in report.lines if line["model"] == model.name]
            chosen, mass, file = write_choice(model, mine, request.quality, request.out)
            print(f"{model.name}: {chosen.label} attends to {mass:.4f} of the mass; use --calibration {file}")


def check_quality(request: EvalRequest) -> None:
    """UserError when --quality is no share of attention mass, or given to another suite."""
    if request.quality is None:
        return
    if request.suite != "attention":
        raise UserError("--quality goes with the suite attention, which measures what it is judged by")
    if not 0 < request.quality <= 1:
        raise UserError(f"--quality is {request.quality}; it must be above 0 and at most 1")


def open_models(request: EvalRequest) -> list[EvalModel]:
    """Every model's config and tokenizer; UserError when two would have one name in the results."""
    source = request.source
    file = None if request.calibration is None else Path(request.calibration)
    names = [source.name_or_path] if request.model is None else words(request.model, "--model")
    models = [
        EvalModel(
            replace(source, name_or_path=name), request.wanted.seed, request.calibrate_on, request.out, file
        )
        for name in names
    ]
    if len({model.name for model in models}) < len(models):
        raise UserError("two of the models have the same name; evaluate them with two --out folders")
    if request.wanted.chat and not all(model.tokenizer.chat_template for model in models):
        raise UserError("not every model has a chat template; leave --chat out")
    return models


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"torch": torch.__version__, "transformers": version("transformers"), "device": device}
