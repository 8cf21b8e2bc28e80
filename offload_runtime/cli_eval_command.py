"""The command `ds-offload eval`: its options, and how they become a request; the work is in cli_eval."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import cli_options as opt
from .cli_exits import clean_exit

if TYPE_CHECKING:  # torch comes with it, which --help does without
    from .cli_eval import EvalRequest

DEPTHS = "0,0.14,0.28,0.42,0.57,0.71,0.85,1"  # eight keys, as many as one document holds

Suite = Annotated[str, typer.Argument(help="passkey, lines, kv, bits, longbench, ruler or attention.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for results; a stopped run goes on there.")]
Models = Annotated[str | None, typer.Option(help="Model directories or hub names, separated by commas.")]
Ctxs = Annotated[str, typer.Option(help="Context lengths, such as 4096,16384.")]
Budgets = Annotated[str, typer.Option(help="Budgets, such as 1/16,2048; dense is always added.")]
Channels = Annotated[str | None, typer.Option(help="Label channels, such as 16,32.")]
LabelBits = Annotated[str, typer.Option(help="Label bits, such as 4,16.")]
Prefetches = Annotated[str, typer.Option(help="Prefetch modes, such as correct,predict.")]
NewRows = Annotated[
    str, typer.Option(help="Sticky selection, such as none,1/8,2048; auto is what generate does.")
]
File = Annotated[list[Path] | None, typer.Option(help="A file of cases; may be repeated.")]
Text = Annotated[Path | None, typer.Option(help="A UTF-8 text: filler, or what is scored.")]
Depths = Annotated[str, typer.Option(help="passkey: places of the keys.")]
Tasks = Annotated[str, typer.Option(help="ruler: which tasks.")]
Documents = Annotated[int, typer.Option(help="Made documents (bits: pieces) per context length.")]
Tokens = Annotated[int, typer.Option(help="bits, attention: tokens of a piece that are decoded.")]
Limit = Annotated[int, typer.Option(help="Most cases of a file.")]
DecodeQuestion = Annotated[
    bool, typer.Option("--decode-question", help="Decode the question sparsely too, not only the answer.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")]
CalibrateOn = Annotated[
    list[Path] | None, typer.Option(help="Text for label maps of an R that the model has no file for.")
]
Quality = Annotated[
    float | None,
    typer.Option(help="attention: choose the cheapest setting that holds this share of the mass."),
]
Seed = Annotated[int, typer.Option(help="Chooses made documents.")]


def evaluate(
    suite: Suite,
    out: Out,
    model: Models = None,
    ctx: Ctxs = "4096",
    budget: Budgets = "1/16",
    channels: Channels = None,
    label_bits: LabelBits = "4",
    prefetch: Prefetches = "correct",
    new_rows: NewRows = "auto",
    file: File = None,
    text: Text = None,
    depths: Depths = DEPTHS,
    tasks: Tasks = "multikey,multivalue,variables,words",
    documents: Documents = 1,
    tokens: Tokens = 256,
    limit: Limit = 1_000_000,
    decode_question: DecodeQuestion = False,
    chat: Chat = False,
    calibration: opt.CalibrationFile = None,
    calibrate_on: CalibrateOn = None,
    quality: Quality = None,
    seed: Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = None,
    revision: opt.Revision = None,
    token: opt.Token = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    rope_scaling: opt.RopeScaling = None,
    quantize: opt.Quantize = None,
    gguf_file: opt.GgufFile = None,
) -> None:
    """Measure quality against dense attention over a grid of settings; table, JSON and pictures."""
    given = dict(locals())
    with clean_exit():
        from .cli_eval import run_eval

        run_eval(request_from(given))


def request_from(given: dict[str, Any]) -> "EvalRequest":
    """The options as cli_eval takes them, by their names; UserError for a device or dtype there is not."""
    from .cli_eval import EvalRequest
    from .evals.suites import Wanted

    def of(kind: type) -> dict[str, Any]:
        return {field.name: given[field.name] for field in fields(kind) if field.name in given}

    wanted = Wanted(**of(Wanted), files=tuple(given["file"] or ()))
    chosen = of(EvalRequest) | {"calibrate_on": given["calibrate_on"] or []}
    return EvalRequest(**chosen, source=opt.model_source(given), wanted=wanted)
