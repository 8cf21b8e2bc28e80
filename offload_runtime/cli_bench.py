"""`ds-offload bench`: a cost card, a table and one JSON line that compare decode speeds in one process.

The one file of the runtime that reaches up to the benchmarks, and only when the command runs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import cli_options as opt
from .cli_exits import clean_exit
from .console import table_console
from .errors import RunError

LOG_COLUMNS = 200  # of a table that goes to a file or a pipe


def bench(
    shape: Annotated[
        str | None,
        typer.Option(help="llama-3.1-8b (default), llama-2-7b, qwen2.5-7b, mixtral-8x7b, tiny."),
    ] = None,
    ctx: Annotated[
        str | None, typer.Option(help="Contexts, such as 32768,262144.", show_default="262144")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Budgets, such as 512,2048,1/64,1/16.", show_default="2048,1/16")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8.", show_default="1")] = None,
    prefetch: Annotated[
        str | None, typer.Option(help="Prefetch modes.", show_default="correct,predict,off")
    ] = None,
    new_rows: Annotated[
        str | None,
        typer.Option(
            help="Sticky selections besides: rows or parts of a budget, or none.", show_default="2048"
        ),
    ] = None,
    resident: Annotated[
        str | None,
        typer.Option(
            help="Resident set on, off (cleared before every step), or both.", show_default="on,off"
        ),
    ] = None,
    locality: Annotated[
        str | None,
        typer.Option(help="no: random; measured: overlaps as a real model's.", show_default="no,measured"),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="dense, streaming, hf-dense, hf-offloaded, or none.", show_default="all"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Timed steps a row; slow baselines take fewer.", show_default="50")
    ] = None,
    locality_model: Annotated[
        list[Path] | None,
        typer.Option(help="A model directory whose locality is printed too; may be repeated."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text to measure locality on.", show_default="64 KB that ship here"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes: seconds, also without a GPU.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON here, row by row.")] = None,
    device: opt.Device = "auto",
) -> None:
    """Compare decode speed with dense, streaming and transformers' caches. Random weights: no quality."""
    given: dict[str, Any] = dict(locals())
    with clean_exit():
        run_bench(given)


def run_bench(given: dict[str, Any]) -> None:
    """Check everything, then measure; each row is in --out as soon as it is there."""
    from .bench.compare import Comparison
    from .bench.cost_card import measure_ceilings
    from .bench.machine import machine
    from .bench.report import Report, print_card, print_rows
    from .bench.request import make_request
    from .engine import choose_device

    started = time.perf_counter()
    place = choose_device(given["device"])
    request = make_request(given, given["quick"], str(place))
    console = output()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    ceilings = measure_ceilings(place)
    head = {"command": "ds-offload bench", "machine": machine(), "device": str(place), **vars(ceilings)}
    report = Report(given["out"], head)
    localities = measured_localities(request, place, report, say) if "measured" in request.localities else []
    Comparison(request, report, ceilings, localities, say).run(lambda card: print_card(console, card))
    report.finish()
    print_rows(console, report.rows)
    for name, what in (("growth", "time, largest over smallest context"), ("batch_gain", "tokens/s")):
        for line in report.data[name]:
            console.print(f"{what}: {json.dumps(line)}", soft_wrap=True, highlight=False)
    for found in report.data.get("locality", []):
        console.print(f"measured locality: {json.dumps(found)}", soft_wrap=True, highlight=False)
    report.data["seconds"] = round(time.perf_counter() - started, 1)
    report.write()
    print(json.dumps(report.data))
    broken = sum(1 for row in report.rows if str(row["error"]).startswith("failed"))
    if broken:
        raise RunError(f"{broken} rows failed for another reason than memory; the table says which")


def measured_localities(request: Any, place: Any, report: Any, say: Any) -> list[Any]:
    """Of the embedded model, which drives selections; other models' are printed beside it."""
    from .bench.locality import measure_locality

    found: list[list[Any]] = []
    steps = min(request.steps, 24)
    for model in request.models:
        name = None if model is None else str(model)
        found.append(measure_locality(name, request.text, max(request.ctxs), request.shares(), steps, place))
        for line in found[-1]:
            say(
                f"{line.source}, {line.tokens} tokens, K {line.budget_tokens}: consecutive selections share "
                f"{line.overlap:.3f}, predictions find {line.recall:.3f} of them"
            )
    report.data["locality"] = [line.as_dict() for lines in found for line in lines]
    return found[0]


def output() -> Console:
    """stdout, wide enough for the table where it is no terminal."""
    console = table_console()
    if not console.is_terminal:
        console.width = LOG_COLUMNS
    return console
