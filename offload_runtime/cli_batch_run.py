"""`ds-offload batch` and `summarize`: check everything, list and lock, then load the model and work."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .architectures import has_length_rotary
from .cache.managed import managed_available
from .calibration_file import own_calibration
from .cli_exits import RUN_ERROR, warn
from .cli_generate import check_file
from .cli_model import config_of, plan_of, weights_of
from .cli_model import load as load_offloaded
from .cli_progress import quiet_unless_terminal
from .config import RuntimeConfig, make_config
from .devices import choose_device
from .errors import UserError
from .jobs import Job, JobRun, LogLines, Summary, Watcher, load_template
from .jobs.documents import FileSource, Source
from .jobs.job import parse_shard
from .jobs.metrics import Metrics
from .jobs.model_answers import ModelAnswerer
from .jobs.progress import clock
from .jobs.ray_job import run_on_ray
from .jobs.rich_progress import JobBars
from .loading import load_tokenizer
from .model_check import ModelShape, check_config, check_label_channels, position_warning
from .model_source import WEIGHT_FORMS, ModelSource
from .places import Work, best_fitting, choose_places, sizes_within
from .planner import Plan, require
from .speed import Traffic

AUTO = "auto"
TERMINATED = 143  # 128 + SIGTERM
COMPRESSED = (".pdf", ".docx")  # their text may have more bytes than the file
PROMPT_SLACK = 1024  # tokens for a chat template around the prompt, when bounding a prompt's length


@dataclass(frozen=True)
class BatchRequest:
    """What the command line asked for."""

    input: str
    output: Path
    prompt_template: str
    source: ModelSource
    settings: dict[str, Any]
    sampling: dict[str, Any]
    long: str
    combine_template: str
    max_new_tokens: int
    text_field: str
    id_field: str | None
    places: str
    shard: str | None
    chat: bool | None
    force: bool
    retry_failed: bool
    max_errors: int | None
    quiet: bool
    metrics_port: int | None
    ray_actors: int | None


def run_batch(request: BatchRequest) -> None:
    """Do the job. Exits 0 when every document has its answer, 1 when some failed, 143 after SIGTERM."""
    model_config = config_of(request.source)
    shape = check_config(model_config)
    config = job_config(request, shape)
    tokenizer = load_tokenizer(request.source.name_or_path, **request.source.hub())
    chat = bool(tokenizer.chat_template) if request.chat is None else request.chat
    if chat and not tokenizer.chat_template:
        raise UserError("this model has no chat template; leave --chat out")
    job = make_job(request, config, chat)
    with watching(request) as watchers, JobRun(job) as run:
        if run.left and request.ray_actors is not None:
            places = 1 if request.places == AUTO else parse_places(request.places)
            loader = partial(load, request, config, chat, places, config.ctx)
            run_on_ray(run, loader, request.ray_actors, watchers, places)
        elif run.left:
            sizes = places_for(request, run, config, model_config)
            model = load(request, config, chat, len(sizes), max(sizes), sizes)
            try:
                run.run(model, watchers)
            finally:
                model.release()
        summary = run.summary
    if not request.quiet:
        Console(stderr=True).print(summary_table(summary, job.output_file))
    if summary.stopped:
        sys.exit(TERMINATED)
    if summary.failed:
        sys.exit(RUN_ERROR)


def job_config(request: BatchRequest, shape: ModelShape) -> RuntimeConfig:
    """The runtime's settings; by default ctx is what the model was trained for, at most 262,144."""
    settings = dict(request.settings)
    if request.sampling["do_sample"]:
        settings.setdefault("seed", 0)  # a job that is started again must write the same text
    if "ctx" not in settings and shape.trained_positions:
        settings["ctx"] = min(RuntimeConfig.ctx, shape.trained_positions)
    config = make_config(settings)
    check_file(config.calibration, "--calibration")
    check_label_channels(config.label_channels, shape)
    if request.ray_actors is not None and request.ray_actors < 1:
        raise UserError(f"--ray-actors is {request.ray_actors}; it must be at least 1")
    warning = position_warning(config.ctx, shape)
    if warning:
        warn(warning)
    return config


def make_job(request: BatchRequest, config: RuntimeConfig, chat: bool) -> Job:
    source = request.source
    return Job(
        input=request.input,
        output=request.output,
        template=load_template(request.prompt_template),
        ctx=config.ctx,
        max_new_tokens=request.max_new_tokens,
        long=request.long,
        combine=load_template(request.combine_template),
        text_field=request.text_field,
        id_field=request.id_field,
        shard=None if request.shard is None else parse_shard(request.shard),
        model_settings={
            "model": source.name_or_path,
            "revision": source.revision,
            "dtype": source.dtype,
            **{name: value for name in WEIGHT_FORMS if (value := getattr(source, name)) is not None},
            "chat": chat,
            "sampling": request.sampling,
            "calibration_sha256": calibration_digest(source, config),
            **vars(config),
            "budget": str(config.budget),
        },
        force=request.force,
        retry_failed=request.retry_failed,
        max_errors=request.max_errors,
    )


def places_for(
    request: BatchRequest, run: JobRun, config: RuntimeConfig, model_config: Any
) -> tuple[int, ...]:
    """Tokens of each place, as many as documents are to decode together. RunError when so many do not fit."""
    place = choose_device(request.source.device)
    bounds, source = bounds_of(run, run.job), request.source
    longest, apart = max(bounds), managed_available(place)

    def planned(count: int, spare: int) -> Plan:
        sizes = sizes_within(bounds, count, spare) if apart else (longest,) * count
        return plan_of(
            source, config, model_config, place, longest, count, continuous=True, place_tokens=sizes
        )

    plan = best_fitting(planned, 1 if request.places == AUTO else parse_places(request.places))
    require(plan)
    alone = place.type == "cpu" or calibration_digest(source, config) is None
    if request.places != AUTO or alone or has_length_rotary(model_config):
        return plan.layout.rooms
    new_rows = config.entering(config.budget_tokens(config.capacity(longest)))
    job = Work(bounds, run.job.max_new_tokens, Traffic(config.prefetch, new_rows))
    return choose_places(planned, weights_of(source, model_config), job).layout.rooms


def parse_places(text: str) -> int:
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise UserError(f"--places is {text!r}; give a number of documents, or auto")


def bounds_of(run: JobRun, job: Job) -> list[int]:
    """An upper bound on the tokens of each document's sequence: no tokenizer makes more tokens than bytes.

    Of the whole input, so that a job that goes on has the caches that it had.
    """
    more = len(job.template.text.encode()) + PROMPT_SLACK + job.max_new_tokens

    def bound(source: Source) -> int:
        compressed = isinstance(source, FileSource) and source.path.suffix.lower() in COMPRESSED
        return job.ctx if compressed else min(job.ctx, source.size + more)

    return [bound(source) for source in run.sources]


def calibration_digest(source: ModelSource, config: RuntimeConfig) -> str | None:
    """Of the calibration file that the model will be loaded with: another one makes other texts."""
    own = own_calibration(source.name_or_path, source.rope_scaling)
    file = own if config.calibration is None else Path(config.calibration)
    return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def load(
    request: BatchRequest,
    config: RuntimeConfig,
    chat: bool,
    places: int,
    tokens: int,
    place_tokens: tuple[int, ...] = (),
) -> ModelAnswerer:
    """The model, ready to answer."""
    source = request.source
    quiet_unless_terminal()
    model = load_offloaded(source, vars(config))
    return ModelAnswerer(model, chat, request.sampling, places, tokens, place_tokens)


@contextmanager
def watching(request: BatchRequest) -> Iterator[list[Watcher]]:
    """Bars on a terminal, log lines elsewhere, nothing with --quiet; metrics if asked for."""
    console = Console(stderr=True)
    watchers: list[Watcher] = []
    if not request.quiet:
        watchers.append(JobBars(console) if console.is_terminal else LogLines())
    if request.metrics_port is not None:
        watchers.append(Metrics(request.metrics_port))
    try:
        yield watchers
    finally:
        for watcher in watchers:
            watcher.close()


def summary_table(summary: Summary, output: Path) -> Table:
    table = Table("what", "figure", title=str(output))
    table.add_row("documents", str(summary.documents))
    table.add_row("written before / now / left", f"{summary.earlier} / {summary.written} / {summary.left}")
    table.add_row("failed", f"{summary.failed}" + (" (--retry-failed)" if summary.failed else ""))
    if summary.written:
        table.add_row("prompt / new tokens", f"{summary.prompt_tokens} / {summary.new_tokens}")
        table.add_row("time", clock(summary.seconds))
        table.add_row("documents an hour", f"{3600 * summary.written / summary.seconds:.1f}")
        gpu = "" if summary.gpu_peak_gb is None else f"GPU peak {summary.gpu_peak_gb:.2f} GB, "
        table.add_row("memory", f"{gpu}host rows {summary.pinned_gb:.2f} GB")
    return table
