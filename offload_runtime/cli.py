"""The ds-offload command: one function a subcommand; each command's work is in its own file.

Text goes to stdout; progress, warnings and summaries go to stderr. Exit codes:
0 done, 1 it cannot be done here, 2 the request is wrong, 130 interrupted,
141 the reader of stdout went away, 143 a batch job stopped on SIGTERM. Torch and
transformers are imported by the commands, not here, so that --help is fast.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from . import cli_options as opt
from .cli_batch import batch, summarize
from .cli_bench import bench
from .cli_eval_command import evaluate
from .cli_exits import clean_exit, quiet_libraries
from .config import CALIBRATION_TOKENS

app = typer.Typer(
    help="Decode at long context on one GPU with the KV cache in pinned host memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


app.command()(batch)
app.command()(summarize)
app.command()(bench)


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False,
) -> None:
    quiet_libraries()


@app.command()
def generate(
    prompt_file_or_dash: Annotated[
        str | None, typer.Argument(metavar="[-]", help="'-' reads the prompt from stdin.")
    ] = None,
    model: opt.Model = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt's text.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A UTF-8 text file; '-' is stdin.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sample at it; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest mass p.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    stats: Annotated[
        str, typer.Option(help="Printed to stderr at the end: summary, table (by layer), json or none.")
    ] = "summary",
    stats_file: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    ctx: opt.Ctx = None,
    budget: opt.Budget = None,
    budget_mass: opt.BudgetMass = None,
    prefetch: opt.Prefetch = None,
    label_channels: opt.LabelChannels = None,
    label_bits: opt.LabelBits = None,
    sinks: opt.Sinks = None,
    recent: opt.Recent = None,
    slots: opt.Slots = None,
    new_rows: opt.NewRows = None,
    chunk_tokens: opt.ChunkTokens = None,
    calibration: opt.CalibrationFile = None,
    seed: opt.Seed = None,
    placement: opt.Placement = None,
    gpu_memory: opt.GpuMemory = None,
    fit: opt.Fit = False,
    save_cache: opt.SaveCache = None,
    load_cache: opt.LoadCache = None,
    audit: opt.Audit = None,
    no_cuda_graph: opt.NoCudaGraph = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    rope_scaling: opt.RopeScaling = None,
    quantize: opt.Quantize = None,
    gguf_file: opt.GgufFile = None,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    given = dict(locals())
    with clean_exit():
        from .cli_generate import GenerateRequest, run_generate

        run_generate(
            GenerateRequest(
                source=opt.model_source(given),
                settings=opt.runtime_settings(given),
                prompt=prompt,
                prompt_file=prompt_file_or_dash if prompt_file is None else prompt_file,
                max_new_tokens=max_new_tokens,
                chat=chat,
                sampling=opt.sampling(given),
                stats=stats,
                stats_file=stats_file,
                save_cache=save_cache,
                load_cache=load_cache,
            )
        )


@app.command()
def chat(
    model: opt.Model = None,
    document: Annotated[str | None, typer.Option(help="A UTF-8 text file to talk about.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="Sample at it; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest mass p.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    ctx: Annotated[
        int | None, typer.Option(help="Most tokens of the conversation.", show_default="document + 8192")
    ] = None,
    budget: opt.Budget = None,
    budget_mass: opt.BudgetMass = None,
    prefetch: opt.Prefetch = None,
    label_channels: opt.LabelChannels = None,
    label_bits: opt.LabelBits = None,
    sinks: opt.Sinks = None,
    recent: opt.Recent = None,
    slots: opt.Slots = None,
    new_rows: opt.NewRows = None,
    chunk_tokens: opt.ChunkTokens = None,
    calibration: opt.CalibrationFile = None,
    seed: opt.Seed = None,
    placement: opt.Placement = None,
    gpu_memory: opt.GpuMemory = None,
    fit: opt.Fit = False,
    no_cuda_graph: opt.NoCudaGraph = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    rope_scaling: opt.RopeScaling = None,
    quantize: opt.Quantize = None,
    gguf_file: opt.GgufFile = None,
) -> None:
    """Talk about a document: question after question, its cache kept. Ctrl-C stops an answer."""
    given = dict(locals())
    with clean_exit():
        from .cli_chat import ChatRequest, run_chat

        run_chat(
            ChatRequest(
                source=opt.model_source(given),
                settings=opt.runtime_settings(given),
                document=document,
                max_new_tokens=max_new_tokens,
                sampling=opt.sampling(given),
            )
        )


@app.command()
def calibrate(
    text_files: Annotated[
        list[Path] | None, typer.Argument(help="UTF-8 texts like those the model will read.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="The same, as an option; may be repeated.")] = None,
    model: opt.Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write.", show_default="beside the model")
    ] = None,
    method: Annotated[
        str, typer.Option(help="projection; learned; greedy; channels, -q or -k: the paper's.")
    ] = "projection",
    channels: Annotated[int, typer.Option(help="Label channels R.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of text to read.")] = CALIBRATION_TOKENS,
    seed: Annotated[int, typer.Option(help="Chooses the passages.")] = 0,
    channels_from: Annotated[
        Path | None,
        typer.Option(help="Take the channels from a JSON file of the Double Sparsity repository (config/)."),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    rope_scaling: opt.RopeScaling = None,
    quantize: opt.Quantize = None,
    gguf_file: opt.GgufFile = None,
) -> None:
    """Find label maps for a model on your own text and write a calibration file; a stopped run goes on."""
    given = dict(locals())
    with clean_exit():
        from .cli_calibrate import run_calibrate

        texts = [*(text_files or []), *(text or [])]
        run_calibrate(opt.model_source(given), texts, method, channels, out, tokens, seed, channels_from)


@app.command()
def plan(
    model: opt.Model = None,
    ctx: opt.Ctx = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    places: Annotated[
        int | None, typer.Option(help="Plan a batch job with so many documents decoded together instead.")
    ] = None,
    budget: opt.Budget = None,
    budget_mass: opt.BudgetMass = None,
    label_channels: opt.LabelChannels = None,
    label_bits: opt.LabelBits = None,
    sinks: opt.Sinks = None,
    recent: opt.Recent = None,
    slots: opt.Slots = None,
    new_rows: opt.NewRows = None,
    chunk_tokens: opt.ChunkTokens = None,
    placement: opt.Placement = None,
    gpu_gb: Annotated[float | None, typer.Option(help="Plan for this much free GPU memory.")] = None,
    host_gb: Annotated[float | None, typer.Option(help="Plan for this much free host memory.")] = None,
    miss_rate: Annotated[
        float, typer.Option(help="Part of a selection that must be fetched when --new-rows is not given.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    rope_scaling: opt.RopeScaling = None,
    quantize: opt.Quantize = None,
    gguf_file: opt.GgufFile = None,
) -> None:
    """Memory and predicted times of a run, and the largest settings that fit. Loads no weights."""
    given = dict(locals())
    with clean_exit():
        from .cli_plan import PlanRequest, run_plan

        run_plan(
            PlanRequest(
                source=opt.model_source(given),
                settings=opt.runtime_settings(given),
                batch=batch,
                places=places,
                gpu_gb=gpu_gb,
                host_gb=host_gb,
                miss_rate=miss_rate,
                as_json=as_json,
            )
        )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """What this machine offers: GPU, link, memory limits, libraries; with a fix for what is amiss."""
    with clean_exit():
        from .doctor import run_doctor

        run_doctor(as_json)


@app.command()
def demo(
    ctx_tokens: Annotated[int, typer.Option(help="Length of the document in tokens.")] = 8192,
    depth: Annotated[float, typer.Option(help="Where the key is hidden: 0 start, 1 end.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Chooses the key and its number.")] = 0,
    prose_file: Annotated[Path | None, typer.Option(help="Hide the key in this text instead.")] = None,
    budget: opt.Budget = None,
    budget_mass: opt.BudgetMass = None,
    prefetch: opt.Prefetch = None,
    new_rows: opt.NewRows = None,
    device: opt.Device = "auto",
) -> None:
    """Hide a pass key in a long text and let the embedded model find it. Exit code 1 if it does not."""
    settings: dict[str, Any] = opt.runtime_settings(dict(locals()))
    with clean_exit():
        from .cli_demo import run_demo

        run_demo(ctx_tokens, depth, seed, prose_file, device, settings)


app.command("eval")(evaluate)  # last in --help


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:  # before a command took over
        sys.exit(130)
