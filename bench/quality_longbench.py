"""LongBench with a small real model: dense against a budget, a table per task, in minutes.

    python -m bench.quality_longbench --model DIR/SmolLM2-135M-Instruct.Q4_1.gguf \
        --calibration smollm2.safetensors --file longbench/*.jsonl --budget 1/8 \
        --out results/quality_longbench --minutes 4

The files hold one {"task", "prompt", "gold"} a line; prompts that are too long lose
their middle, as LongBench cuts them. Each prompt is prefilled once and answered dense
and under every budget (bench/shared_prefill.py); cases of the tasks take turns, so a
run that is cut off has some of every task, and the same command goes on from there.
OUT gets results.jsonl (a row as soon as it is known), summary.json, table.md and a picture.
"""

import argparse
import itertools
import json
import time
import traceback
from pathlib import Path
from typing import Any

from offload_runtime.bench.machine import machine
from offload_runtime.bench.shared_prefill import EVERYTHING, Job, SharedPrefill, of_suite, run_job
from offload_runtime.engine import OffloadedModel
from offload_runtime.errors import UserError
from offload_runtime.evals import longbench
from offload_runtime.evals.asking import ask
from offload_runtime.evals.cases import Group, Tokens
from offload_runtime.evals.grid import DENSE, Setting
from offload_runtime.evals.plots import score_bars
from offload_runtime.evals.records import Results, make_folder
from offload_runtime.evals.summary import summarise, with_averages


def judged(runtime: OffloadedModel, group: Group, case: Any) -> dict[str, Any]:
    """Answer one prompt that is in the caches and score it by its task's metric."""
    answer = ask(runtime, group, case, decode_question=False, resume=True)
    score = longbench.metric_of(group.task)(answer, case.gold)
    figures = {"score": score, "answer": answer, "gold": list(case.gold)}
    return figures | {"budget_tokens": runtime.stats["budget_tokens"]}


def in_turns(groups: list[Group], limit: int) -> list[Group]:
    """At most `limit` cases of each task, a case of every task before the next of any."""
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    rounds = itertools.zip_longest(*(mine[:limit] for mine in tasks.values()))
    return [group for one in rounds for group in one if group is not None]


def run_all(options: argparse.Namespace, known: Results, failures: list[str]) -> None:
    until = time.monotonic() + 60 * options.minutes
    runtime = OffloadedModel.from_pretrained(
        options.model, device=options.device, ctx=options.ctx, budget=EVERYTHING,
        label_bits=options.label_bits, calibration=options.calibration, new_rows="none",
    )  # fmt: skip
    tokens, name = Tokens(runtime.tokenizer, options.chat), Path(options.model).name
    groups = longbench.groups(tokens, options.ctx, options.file, options.limit)
    sparse = [Setting(budget, None, options.label_bits, new_rows="none") for budget in options.budget]
    shared = SharedPrefill(runtime, least=options.ctx)
    for group in in_turns(groups, options.limit):
        job = Job("longbench", group, (DENSE, *sparse), judged, {"chat": options.chat})
        try:
            if not run_job(job, shared, name, known, until):
                return
        except Exception as error:  # a case that fails must not cost the others
            shared.prefix = None
            failures.append(f"{group.task} {group.cases[0].name}: {error!r}")
            traceback.print_exc()
            runtime.close()
        print(f"{group.task} {group.cases[0].name}", flush=True)


def markdown(lines: list[dict[str, Any]]) -> str:
    """Scores in percent by task, dense beside every budget on the cases that both answered."""
    sparse = [line for line in lines if line["budget"] != DENSE.budget]
    out = ["| task | budget | cases | dense % | sparse % | points |", "| --- | --- | --- | --- | --- | --- |"]
    for line in sorted(sparse, key=lambda line: line["budget"]):
        score, dense = 100 * line["score"], 100 * line["dense"]
        figures = f"{dense:.1f} | {score:.1f} | {score - dense:+.1f}"
        out.append(f"| {line['task']} | {line['budget']} | {line['cases']} | {figures} |")
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory or GGUF file")
    parser.add_argument("--calibration", help="its label maps; else every prompt calibrates the model")
    parser.add_argument("--file", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--budget", nargs="+", default=["1/8"])
    parser.add_argument("--label-bits", type=int, default=4)
    parser.add_argument("--limit", type=int, default=1_000_000, help="most cases of a task")
    parser.add_argument("--no-chat", dest="chat", action="store_false", help="plain prompts")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    make_folder(options.out)
    known, failures = Results(options.out / "results.jsonl"), []  # type: Results, list[str]
    if options.minutes > 0:
        try:
            run_all(options, known, failures)
        except UserError as error:  # a file that is missing, a model that cannot be read
            parser.exit(2, f"{error}\n")
    rows = of_suite(known, "longbench")
    if not rows:
        print("no case was answered in time")
        return
    lines = with_averages(summarise(rows, None))
    summary = {"machine": machine(), "failures": failures, "lines": lines}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (options.out / "table.md").write_text(markdown(lines))
    score_bars(rows, options.out, "longbench")
    print(markdown(lines))
    print("failures:", failures)


if __name__ == "__main__":
    main()
