"""Quality up to 262,144 tokens in five minutes of GPU, against dense: retrieval, mass, bits per byte.

    python -m bench.quality_long --text moby_dick.txt --out results/quality_long --minutes 5 \
        --labels 32x4 16x16:calibration16.safetensors

Every document is prefilled once for a kind of label and asked under all budgets
(bench/shared_prefill.py). Work is in the order of what matters most; when the
minutes are over the rest is left out, and the same command goes on from there.
Every row is on disk in OUT/results.jsonl as soon as it is known. OUT/summary.json
and the pictures are made at the end, or by --minutes 0 from what is there.
"""

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload_runtime.bench.machine import ROOT, machine
from offload_runtime.bench.shared_prefill import Job, SharedPrefill, of_suite, open_runtime, run_job
from offload_runtime.calibration import Calibration
from offload_runtime.engine import OffloadedModel
from offload_runtime.evals import attention, bits, lines, metrics, passkey
from offload_runtime.evals.asking import ask
from offload_runtime.evals.cases import Group, Tokens
from offload_runtime.evals.grid import DENSE, Setting
from offload_runtime.evals.plots import depth_maps
from offload_runtime.evals.records import Results, make_folder
from offload_runtime.evals.summary import summarise

EMBEDDED = ROOT / "offload_runtime" / "data" / "tiny-256k"
DEPTHS = [(step + 0.5) / 8 for step in range(8)]  # eight keys a document, as the model was made for
BUDGETS = ("1/16", "2048")
BIT_BUDGETS = ("1/16", "1/64")
SEED = 0
JOINTS = (
    1024  # a document may be a few tokens longer than asked for, and caches must not grow under a question
)


def judged(metric: metrics.Metric) -> Any:
    """Ask and judge one question whose document is in the caches."""

    def look(runtime: OffloadedModel, group: Group, case: Any) -> dict[str, Any]:
        answer = ask(runtime, group, case, decode_question=False, resume=True)
        figures = {"score": metric(answer, case.gold), "answer": answer[:100], "gold": list(case.gold)}
        return figures | {"budget_tokens": runtime.stats["budget_tokens"]}

    return look


def scored(runtime: OffloadedModel, group: Group, case: Any) -> dict[str, Any]:
    """Bits of one piece of text."""
    return next(bits.measure(runtime, group, [case], resume=True))[1]


def watched(runtime: OffloadedModel, group: Group, case: Any) -> dict[str, Any]:
    """Attention mass over decode steps; the runtime must have no CUDA graph."""
    return next(attention.measure(runtime, group, [case], resume=True))[1]


class Work:
    """The jobs in order, each made (tokenised) when its turn comes."""

    def __init__(self, tokens: Tokens, text: str, options: argparse.Namespace) -> None:
        self.tokens, self.text, self.options = tokens, text, options
        self.main, *self.others = [label_of(word, options)[0] for word in options.labels]
        self.longest = max(options.ctx)

    def jobs(self) -> Iterator[Job]:
        halves = (
            range(self.options.documents // 2),
            range(self.options.documents // 2, self.options.documents),
        )
        for document in halves[0]:
            yield self.passkey(self.longest, document, self.main, dense=True)
            yield self.lines(self.longest, document, self.main, dense=True)
        for label in (self.main, *self.others):
            yield self.attention(label)
        for ctx in sorted(self.options.bit_ctx, reverse=True):
            for label in (self.main, *self.others, replace(self.main, prefetch="predict")):
                yield self.bits(ctx, 0, label)
        for ctx in sorted(self.options.ctx)[:-1]:
            yield self.passkey(ctx, 0, self.main, dense=True)
        for document in halves[1]:
            yield self.passkey(self.longest, document, self.main, dense=True)
            yield self.lines(self.longest, document, self.main, dense=True)
        for label in self.others:
            for document in halves[0]:
                yield self.passkey(self.longest, document, label, dense=False)
                yield self.lines(self.longest, document, label, dense=False)
        for ctx in sorted(self.options.bit_ctx, reverse=True):
            for label in (self.main, *self.others):
                yield self.bits(ctx, 1, label)
        for ctx in sorted(self.options.ctx)[:-1]:
            yield self.passkey(ctx, 1, self.main, dense=True)

    def passkey(self, ctx: int, document: int, label: Setting, dense: bool) -> Job:
        """Eight keys in a document of prose, one at each depth."""
        (group,) = passkey.groups(self.tokens, ctx, DEPTHS, 1, SEED + document, self.text)
        return self.retrieval("passkey", group, document, label, dense, metrics.first_word)

    def lines(self, ctx: int, document: int, label: Setting, dense: bool) -> Job:
        """Eight of all the lines of a document, evenly spread."""
        (group,) = lines.groups(self.tokens, ctx, (), 1, 1, SEED + document)
        return self.retrieval("lines", group, document, label, dense, metrics.line_number)

    def retrieval(
        self, suite: str, group: Group, document: int, label: Setting, dense: bool, metric: metrics.Metric
    ) -> Job:
        cases = tuple(replace(case, name=f"seed {SEED + document}, {case.name}") for case in group.cases)
        settings = [replace(label, budget=budget) for budget in BUDGETS]
        return Job(
            suite, replace(group, cases=cases), (*([DENSE] if dense else []), *settings), judged(metric), {}
        )

    def attention(self, label: Setting) -> Job:
        (group,) = bits.groups(self.tokens, self.longest, self.text, 1, self.options.watched)
        settings = tuple(replace(label, budget=budget) for budget in BUDGETS)
        return Job("attention", group, settings, watched, {})

    def bits(self, ctx: int, piece: int, label: Setting) -> Job:
        """One of two pieces of the text; dense goes with the first kind of label."""
        group = bits.groups(self.tokens, ctx, self.text, 2, self.options.scored)[piece]
        settings = [replace(label, budget=budget) for budget in BIT_BUDGETS]
        return Job("bits", group, (*([DENSE] if label == self.main else []), *settings), scored, {})


def label_of(word: str, options: argparse.Namespace) -> tuple[Setting, Path | None]:
    """ "16x4" or "16x4:FILE" as a setting and the calibration file that has so many channels."""
    kind, _, file = word.partition(":")
    channels, bit_count = kind.split("x")
    how = {"prefetch": options.prefetch, "new_rows": options.new_rows}
    setting = Setting(BUDGETS[0], int(channels), int(bit_count), **how)
    return setting, Path(file) if file else None


def label_kind(setting: Setting) -> tuple[int | None, int]:
    return setting.channels, setting.bits


def calibration_for(base: OffloadedModel, file: Path | None, setting: Setting) -> Calibration | None:
    """From the file, or the model's own where it has as many channels; else the prompt's own."""
    if file is not None:
        return Calibration.load(file)
    own = base.calibration
    return own if own is not None and own.key_map.shape[2] == setting.channels else None


def run_all(options: argparse.Namespace, known: Results, failures: list[str]) -> None:
    """Every job until the time is over; one that fails is recorded and the next one begun."""
    until = time.monotonic() + 60 * options.minutes
    base = OffloadedModel.from_pretrained(options.model, device=options.device)
    text = Path(options.text).read_text(encoding="utf-8")
    work, name = Work(Tokens(base.tokenizer), text, options), Path(options.model).name
    calibrations = {
        label_kind(setting): calibration_for(base, file, setting)
        for setting, file in (label_of(word, options) for word in options.labels)
    }
    open_now: dict[Any, SharedPrefill] = {}
    for job in work.jobs():
        if time.monotonic() > until:
            break
        label = replace(job.settings[-1], budget=BUDGETS[0])
        kind = (label, job.suite == "attention")
        if kind not in open_now:
            for shared in open_now.values():
                shared.runtime.close()
            more = {"cuda_graph": False} if kind[1] else {}
            ctx = max(options.ctx + options.bit_ctx) + JOINTS
            open_now = {kind: open_runtime(base, label, ctx, calibrations[label_kind(label)], **more)}
        started = time.monotonic()
        try:
            run_job(job, open_now[kind], name, known, until)
        except Exception as error:  # a row that fails must not cost the others
            failures.append(f"{job.suite} at {job.group.ctx}, {label.label}: {error!r}")
            traceback.print_exc()
            open_now.pop(kind).runtime.close()
        seconds = time.monotonic() - started
        print(f"{job.suite} {job.group.ctx} {label.label}: {seconds:.1f} s", flush=True)


def report(known: Results, out: Path, failures: list[str]) -> dict[str, Any]:
    """Summary of all rows there are, and the pictures."""
    summary: dict[str, Any] = {"machine": machine(), "failures": failures}
    for suite in ("passkey", "lines"):
        rows = of_suite(known, suite)
        if rows:
            summary[suite] = summarise(rows, right=1.0)
            depth_maps(rows, out, suite)
    if rows := of_suite(known, "bits"):
        summary["bits"] = bits.report(rows, out).lines
    if rows := of_suite(known, "attention"):
        summary["attention"] = attention.report(rows, out).lines
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(EMBEDDED))
    parser.add_argument("--text", required=True, help="a long text that calibration has not seen")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--labels", nargs="+", default=["32x4"], help="channels x bits[:calibration], best first"
    )
    parser.add_argument(
        "--new-rows", default="auto", help="none selects exactly, as the committed results did"
    )
    parser.add_argument("--prefetch", default="correct")
    parser.add_argument("--ctx", nargs="+", type=int, default=[8192, 16384, 32768, 65536, 131072, 262144])
    parser.add_argument("--bit-ctx", nargs="+", type=int, default=[65536, 131072, 262144])
    parser.add_argument("--documents", type=int, default=8, help="of the longest context, 8 questions each")
    parser.add_argument("--scored", type=int, default=512, help="tokens a piece for bits per byte")
    parser.add_argument("--watched", type=int, default=24, help="steps for attention statistics")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    make_folder(options.out)
    known, failures = Results(options.out / "results.jsonl"), []  # type: Results, list[str]
    if options.minutes > 0:
        torch.manual_seed(SEED)
        run_all(options, known, failures)
    summary = report(known, options.out, failures)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for suite in ("passkey", "lines", "bits", "attention"):
        for line in summary.get(suite, []):
            print(suite, json.dumps({k: v for k, v in line.items() if k != "layers"}))
    print("failures:", failures)


if __name__ == "__main__":
    main()
