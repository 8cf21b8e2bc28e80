"""The commands `ds-offload batch` and `ds-offload summarize`: their options; the work is in cli_batch_run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_options as opt
from .cli_exits import clean_exit

Input = Annotated[
    str, typer.Option("--input", help="A folder, a .jsonl file, one document, or a 'pattern*'.")
]
Output = Annotated[Path, typer.Option("--output", help="The JSONL to write; started again, it goes on.")]
Long = Annotated[
    str | None,
    typer.Option(
        help="Documents longer than ctx: refuse, cut-head, cut-tail, cut-middle or map-reduce. "
        "Default: refuse; for summarize: map-reduce."
    ),
]
CombineTemplate = Annotated[str, typer.Option(help="The prompt that joins answers about parts (map-reduce).")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
TextField = Annotated[str, typer.Option(help="JSONL field with the document's text.")]
IdField = Annotated[str | None, typer.Option(help="JSONL field with its id. Default: id, else line-N.")]
Places = Annotated[
    str,
    typer.Option(
        help="Documents decoded together, each leaving when done: a number, or auto (the plan says)."
    ),
]
Shard = Annotated[str | None, typer.Option(help="Do part i of n, as in 2/8; writes OUT.2-of-8.jsonl.")]
Chat = Annotated[
    bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. Default: if there is one.")
]
Force = Annotated[bool, typer.Option("--force", help="Go on in an output of other settings.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Do documents with an error line again.")]
MaxErrors = Annotated[int | None, typer.Option(help="Stop when more documents fail. Default: never.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary.")]
MetricsPort = Annotated[int | None, typer.Option(help="Serve Prometheus metrics here while it runs.")]
RayActors = Annotated[
    int | None, typer.Option(help="Spread the documents over this many Ray actors, one GPU each.")
]
Temperature = Annotated[float | None, typer.Option(help="Sample at it. Default: greedy.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest mass p.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="1 is none.")]


def batch(
    input_: Input,
    output: Output,
    prompt_template: Annotated[str, typer.Option(help="A file with {document} in it, or a built-in name.")],
    model: opt.Model = None,
    long: Long = None,
    combine_template: CombineTemplate = "combine",
    max_new_tokens: MaxNewTokens = 512,
    text_field: TextField = "text",
    id_field: IdField = None,
    places: Places = "auto",
    shard: Shard = None,
    chat: Chat = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    force: Force = False,
    retry_failed: RetryFailed = False,
    max_errors: MaxErrors = None,
    quiet: Quiet = False,
    metrics_port: MetricsPort = None,
    ray_actors: RayActors = None,
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
    """Answer one prompt about every document; one JSON line each."""
    start(dict(locals()), "refuse")


def summarize(
    input_: Input,
    output: Output,
    prompt_template: Annotated[
        str, typer.Option(help="Another prompt: a file or a built-in name.")
    ] = "summarize",
    model: opt.Model = None,
    long: Long = None,
    combine_template: CombineTemplate = "combine",
    max_new_tokens: MaxNewTokens = 512,
    text_field: TextField = "text",
    id_field: IdField = None,
    places: Places = "auto",
    shard: Shard = None,
    chat: Chat = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    force: Force = False,
    retry_failed: RetryFailed = False,
    max_errors: MaxErrors = None,
    quiet: Quiet = False,
    metrics_port: MetricsPort = None,
    ray_actors: RayActors = None,
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
    """Summarise every document; long ones part by part. One JSON line each."""
    start(dict(locals()), "map-reduce")


def start(given: dict[str, Any], long: str) -> None:
    """Run the job that the options describe; `long` is the command's default for --long."""
    with clean_exit():
        from .cli_batch_run import BatchRequest, run_batch

        names = BatchRequest.__dataclass_fields__
        chosen = {name: given[name] for name in names if name in given}
        request = BatchRequest(
            **{**chosen, "long": given["long"] or long},
            input=given["input_"],
            source=opt.model_source(given),
            settings=opt.runtime_settings(given),
            sampling=opt.sampling(given),
        )
        run_batch(request)
