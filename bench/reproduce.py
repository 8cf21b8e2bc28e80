"""Everything that the README and docs/results.md say was measured, again: one command, results as JSON files.

    python -m bench.reproduce --texts BOOKS --out bench/results            # all that there are inputs for
    python -m bench.reproduce --texts BOOKS --out bench/results --only decode,contexts
    python -m bench.reproduce --list

BOOKS is a folder with moby_dick.txt, war_and_peace.txt and wealth_of_nations.txt, plain texts of over 1 MB.
Each measurement is a process of its own with a time limit, its output in OUT/logs; one that fails or runs too
long does not keep the next from running. The last lines say how each ended; the exit code is 1 if any failed.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from offload_runtime.bench.machine import ROOT
from offload_runtime.errors import UserError

BOOKS = ("moby_dick.txt", "war_and_peace.txt", "wealth_of_nations.txt")
CALIBRATE = "-m offload_runtime calibrate"
BENCH = "-m offload_runtime bench --resident on"
SMOLLM2_QUALITY = "--model {smollm2} --calibration {out}/smollm2.safetensors"


@dataclass(frozen=True)
class Step:
    """One measurement. commands: arguments of Python, run in turn; limit_s: of all of them on one H100.

    The limits are twice what was seen there, or a guess where it was not run yet (new=True).
    """

    name: str
    limit_s: int
    commands: tuple[str, ...]
    new: bool = False


# In the order of what readers ask for first.
STEPS = (
    Step("ops", 120, ("-m bench.ops --out {out}/ops.json",), new=True),
    Step("main-job", 120, ("-m bench.main_job passkey --text {moby} --out {out}/main_job_passkey.json",)),
    Step("bits", 120, ("-m bench.main_job bits --text {moby} --out {out}/main_job_bits.json",)),
    Step(
        "decode",
        400,
        (
            BENCH + " --text {moby} --baselines dense,streaming,hf-dense,hf-offloaded"
            " --out {out}/bench_llama8b_262144.json",
        ),
    ),
    Step(
        "contexts",
        400,
        (
            BENCH + " --ctx 32768,65536,131072,262144 --budget 512,2048,1/64,1/16 --new-rows none"
            " --prefetch correct,predict --locality no --baselines dense,streaming,hf-dense"
            " --out {out}/bench_llama8b_contexts.json",
        ),
        new=True,
    ),
    Step(
        "quality",
        400,
        ("-m bench.quality_long --text {moby} --new-rows none --out {out}/quality_long --minutes 6",),
    ),
    Step(
        "quality-sticky",
        400,
        ("-m bench.quality_long --text {moby} --out {out}/quality_long_sticky --minutes 6",),
        new=True,
    ),
    Step(
        "batches",
        400,
        (
            BENCH + " --shape qwen2.5-7b --ctx 131072 --batch 1,8 --budget 2048 --new-rows none,256,512"
            " --prefetch correct,predict --locality no --baselines dense --out {out}/bench_qwen7b.json",
            # 137 GB of host memory
            BENCH + " --ctx 131072 --batch 1,8 --budget 2048 --new-rows none,256,512"
            " --prefetch correct,predict --locality no --baselines none --out {out}/bench_llama8b_batch.json",
        ),
    ),
    Step(
        "llama2",
        300,
        (
            BENCH + " --shape llama-2-7b --ctx 131072 --budget 2048,1/16 --prefetch correct,predict"
            " --locality no --baselines dense --out {out}/bench_llama2_7b.json",
        ),
        new=True,
    ),
    Step(
        "mixtral",
        300,
        (
            BENCH + " --shape mixtral-8x7b --ctx 131072 --budget 2048 --prefetch correct,predict"
            " --new-rows none --locality no --baselines dense --out {out}/bench_mixtral.json",
        ),
        new=True,
    ),
    Step("prefill", 500, ("-m bench.prefill --full --out {out}/prefill_llama8b.json",)),
    Step(
        "continuous",
        590,
        ("-m bench.continuous --settings 1 8:sized2:x8 --slots 8192 --out {out}/continuous.json",),
        new=True,
    ),
    Step("beside", 200, ("-m bench.beside --out {out}/beside.json",), new=True),
    Step(
        "r16",
        300,
        (
            "-m bench.lookup_text --documents 45 --prose {war} --out {out}/lookups.txt",
            CALIBRATE + " --model {tiny} --text {out}/lookups.txt --method learned"
            " --channels 16 --out {out}/look16.safetensors",
            "-m bench.quality_long --text {moby} --labels 16x16:{out}/look16.safetensors --new-rows none"
            " --ctx 262144 --bit-ctx 262144 --documents 4 --out {out}/quality_long_r16_lookup",
        ),
        new=True,
    ),
    Step(
        "selection",
        300,
        (
            "-m bench.sticky --model {tiny} --calibration {tiny}/calibration.safetensors --text {moby}"
            " --tokens 8192 --out {out}/sticky_tiny-256k.json",
            "-m bench.prediction --model {tiny} --calibrate {wealth} --test {moby}"
            " --out {out}/prediction_tiny-256k.json",
            "-m offload_runtime eval attention --ctx 32768 --budget 1/16 --new-rows none,1/8,1/16"
            " --text {moby} --tokens 48 --out {out}/eval_sticky",
            "-m offload_runtime eval bits --ctx 32768 --budget 1/16 --new-rows none,1/8"
            " --prefetch correct,predict --text {moby} --tokens 512 --documents 2 --out {out}/eval_sticky",
        ),
        new=True,
    ),
    Step(
        "row-bits",
        300,
        (
            "-m bench.row_bits --model {tiny} --text {moby} --tokens 8192"
            " --out {out}/row_bits_tiny-256k.json",
            "-m bench.row_bits --model {smollm2} --text {moby} --out {out}/row_bits_smollm2.json",
        ),
        new=True,
    ),
    Step(
        "selection-smollm2",
        600,
        (
            CALIBRATE + " --model {smollm2} --text {wealth} --out {out}/smollm2.safetensors",
            "-m bench.sticky " + SMOLLM2_QUALITY + " --text {moby} --tokens 8192"
            " --out {out}/sticky_smollm2.json",
            "-m bench.prediction --model {smollm2} --calibrate {wealth} --test {moby} --tokens 4096"
            " --out {out}/prediction_smollm2.json",
            "-m offload_runtime eval attention " + SMOLLM2_QUALITY + " --ctx 8192 --budget 1/16"
            " --new-rows none,1/8 --text {moby} --tokens 48 --out {out}/eval_smollm2",
            "-m offload_runtime eval bits "
            + SMOLLM2_QUALITY
            + " --ctx 8192 --budget 1/16 --new-rows none,1/8"
            " --prefetch correct,predict --text {moby} --tokens 512 --documents 2 --out {out}/eval_smollm2",
        ),
        new=True,
    ),
    Step(
        "guesses",
        500,
        (
            "-m bench.quality_long --text {moby} --prefetch predict --new-rows 2048 --ctx 262144"
            " --bit-ctx 262144 --documents 6 --minutes 1 --out {out}/quality_long_sticky_predict",
            CALIBRATE + " --model {smollm2} --text {wealth} --text {war} --tokens 65536"
            " --out {out}/smollm2_two_books.safetensors",
            "-m offload_runtime eval attention --model {smollm2}"
            " --calibration {out}/smollm2_two_books.safetensors --ctx 8192 --budget 1/16 --new-rows none,1/8"
            " --prefetch correct,predict --text {moby} --tokens 48 --documents 2"
            " --out {out}/eval_smollm2_guess",
        ),
        new=True,
    ),
    Step("quantised", 300, ("-m bench.quantised --out {out}/quantised_llama8b.json",)),
    Step(
        "batch-job",
        120,
        (
            "-m bench.batch_job --texts {moby} {war} {wealth} --documents 20 --max-new-tokens 32 --kills 0"
            " --out {out}/batch_job.json",
        ),
    ),
    Step(
        "longbench",
        400,
        (
            CALIBRATE + " --model {smollm2} --text {wealth} --out {out}/smollm2.safetensors",
            "-m bench.quality_longbench " + SMOLLM2_QUALITY + " --file {longbench}/*.jsonl --budget 1/8"
            " --out {out}/longbench",
            "-m bench.summarize_quality " + SMOLLM2_QUALITY + " --data {longbench}/gov_report.jsonl"
            " --max-new-tokens 256 --limit 12 --out {out}/summaries_gov_report.json",
        ),
    ),
)


def chosen(only: str | None) -> list[Step]:
    """The steps of those names, in the order of STEPS; all by default."""
    if only is None:
        return list(STEPS)
    names = only.split(",")
    known = {step.name for step in STEPS}
    for name in names:
        if name not in known:
            raise UserError(f"--only {name!r} is unknown; choose from {', '.join(known)}")
    return [step for step in STEPS if step.name in names]


def inputs(options: argparse.Namespace) -> dict[str, str]:
    """What commands may name, as far as it is there."""
    found = {"out": shlex.quote(str(options.out.resolve())), "tiny": "offload_runtime/data/tiny-256k"}
    if options.texts is not None:
        for file in BOOKS:
            if (options.texts / file).is_file():
                found[file.split("_")[0]] = shlex.quote(str((options.texts / file).resolve()))
    for name in ("smollm2", "longbench"):
        path = getattr(options, name)
        if path is not None and path.exists():
            found[name] = shlex.quote(str(path.resolve()))
    return found


def run(step: Step, names: dict[str, str], log: Path) -> str:
    """How it ended, in a few words."""
    try:
        commands = [command.format_map(names) for command in step.commands]
    except KeyError as error:
        return f"left out, there is no {error.args[0]}"
    started = time.monotonic()
    with log.open("wb") as stream:
        for command in commands:
            # By a shell, for the quotes and patterns in commands.
            line = f"exec {shlex.quote(sys.executable)} {command}"
            code = run_in_time(line, stream, step.limit_s - (time.monotonic() - started))
            if code is None:
                return f"failed: not done in {step.limit_s} s"
            if code:
                return f"failed: exit code {code}, see {log}"
    return f"done in {time.monotonic() - started:.0f} s"


def run_in_time(line: str, stream: IO[Any], limit_s: float) -> int | None:
    """A shell line's exit code; None when it was ended, with all that it started, at the time limit."""
    process = subprocess.Popen(
        line, shell=True, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def report(steps: Sequence[Step], ended: dict[str, str]) -> None:
    width = max(len(step.name) for step in steps)
    for step in steps:
        print(f"{step.name:{width}}  {ended[step.name]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, help="folder with the three books")
    parser.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, or a model directory")
    parser.add_argument("--longbench", type=Path, help="folder with LongBench's tasks as JSONL files")
    parser.add_argument("--only", help="names separated by commas")
    parser.add_argument("--list", action="store_true", help="name the measurements and their commands")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    try:
        steps = chosen(options.only)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    if options.list:
        for step in steps:
            print(f"{step.name} ({step.limit_s} s at most{', not run yet' if step.new else ''})")
            print("".join(f"    python {command}\n" for command in step.commands), end="")
        return
    (options.out / "logs").mkdir(parents=True, exist_ok=True)
    names, ended = inputs(options), dict[str, str]()
    for step in steps:
        ended[step.name] = run(step, names, options.out / "logs" / f"{step.name}.log")
        print(f"{step.name}: {ended[step.name]}", flush=True)
    report(steps, ended)
    if any(words.startswith("failed") for words in ended.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
