"""The command `ds-offload eval`: its options; the work is in cli_eval."""

from pathlib import Path
from typing import Annotated

import typer

from . import cli_options as opt
from .cli_exits import clean_exit

DEPTHS = "0,0.14,0.28,0.42,0.57,0.71,0.85,1"  # eight keys, as many as one document holds


def evaluate(
    suite: Annotated[str, typer.Argument(help="passkey, lines, kv, bits, longbench, ruler or attention.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for results; a stopped run goes on there.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model directories or hub names, separated by commas.")
    ] = None,
    ctx: Annotated[str, typer.Option(help="Context lengths, such as 4096,16384.")] = "4096",
    budget: Annotated[str, typer.Option(help="Budgets, such as 1/16,2048; dense is always added.")] = "1/16",
    channels: Annotated[str | None, typer.Option(help="Label channels, such as 16,32.")] = None,
    label_bits: Annotated[str, typer.Option(help="Label bits, such as 4,16.")] = "4",
    prefetch: Annotated[str, typer.Option(help="Prefetch modes, such as correct,predict.")] = "correct",
    new_rows: Annotated[
        str, typer.Option(help="Sticky selection, such as none,1/8,2048; auto is what generate does.")
    ] = "auto",
    file: Annotated[list[Path] | None, typer.Option(help="A file of cases; may be repeated.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text: filler, or what is scored.")] = None,
    depths: Annotated[str, typer.Option(help="passkey: places of the keys.")] = DEPTHS,
    tasks: Annotated[str, typer.Option(help="ruler: which tasks.")] = "multikey,multivalue,variables,words",
    documents: Annotated[int, typer.Option(help="Made documents (bits: pieces) per context length.")] = 1,
    tokens: Annotated[int, typer.Option(help="bits, attention: tokens of a piece that are decoded.")] = 256,
    limit: Annotated[int, typer.Option(help="Most cases of a file.")] = 1_000_000,
    decode_question: Annotated[
        bool, typer.Option("--decode-question", help="Decode the question sparsely too, not only the answer.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    calibration: opt.CalibrationFile = None,
    calibrate_on: Annotated[
        list[Path] | None, typer.Option(help="Text for label maps of an R that the model has no file for.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(help="attention: choose the cheapest setting that holds this share of the mass."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses made documents.")] = 0,
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
        from .cli_eval import EvalRequest, run_eval
        from .evals.suites import Wanted

        wanted = Wanted(
            files=tuple(file or ()),
            text=text,
            depths=depths,
            tasks=tasks,
            documents=documents,
            tokens=tokens,
            limit=limit,
            seed=seed,
            chat=chat,
            decode_question=decode_question,
        )
        run_eval(
            EvalRequest(
                suite=suite,
                source=opt.model_source(given),
                models=model,
                ctxs=ctx,
                budgets=budget,
                channels=channels,
                bits=label_bits,
                prefetch=prefetch,
                new_rows=new_rows,
                calibration=calibration,
                calibrate_on=calibrate_on or [],
                out=out,
                quality=quality,
                wanted=wanted,
            )
        )
