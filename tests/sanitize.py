"""compute-sanitizer over the kernel tests: python -m tests.sanitize --out DIR [--seconds 150] [--only TOOL].

Every job is a process of its own. Under racecheck some tests take minutes, and a tool that is killed prints
no summary, so an alarm ends a job's tests after --seconds: "stopped" jobs have run the tests that ended.
The last line says how many jobs found something, or ended without a summary; the exit code is 1 if any.
"""

import argparse
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
import torch

from offload_runtime.bench.reproduce import run_in_time

SUMMARY = {"memcheck": r"ERROR SUMMARY: (\d+) errors?", "racecheck": r"RACECHECK SUMMARY: (\d+) hazards?"}
GRACE_S = 60  # for the test that runs when the alarm comes, and the tool's summary
# (tests of a kernel, and which of them): small ones, each a process that shows something within two minutes.
JOBS = (
    ("test_select_cluster", "lengths and (1-63 or 1-127 or 1-1000)"),
    ("test_select_cluster", "equal_scores"),
    ("test_select_cluster", "label_formats"),
    ("test_admission", "take_all"),
    ("test_admission", "became_shorter"),
    ("test_admission", "equal_scores"),
    ("test_residency", "not 256k"),
    ("test_gather_bulk", "1-8-512 or 1-8-64 or few_of_many"),
    ("test_gather_bulk", "4-2"),
    ("test_attend_in_parts", "8-80 and float32"),
    ("test_attend_in_parts", "1-64 or 4-128"),
    ("test_attend_in_parts", "8-80 and bfloat16 or more_enters or wherever"),
    ("test_topk", "not 256k"),
    ("test_sticky", "not 256k"),
    ("test_kernels_triton", "append or gather or labels"),
    ("test_kernels_triton", "scores"),
    ("test_kernels_triton", "attention"),
    ("test_products", "one_input"),
    ("test_products", "residual or gated"),
    ("test_fused_ops", "rms_norm"),
    ("test_fused_ops", "rotary and 128"),
    ("test_split_attention", "merge_kernel"),
    ("test_masked_prefill", "gpu or cuda"),
    ("test_early_launch", "chain"),
)


@dataclass(frozen=True)
class Result:
    """One job's end. found: errors or hazards, None without a summary; passed: tests that ended well."""

    tool: str
    file: str
    choice: str
    found: int | None
    passed: int
    failed: bool
    stopped: bool

    def line(self) -> str:
        what = "no summary" if self.found is None else f"{self.found} found"
        words = [what, f"{self.passed} passed", *["failed"] * self.failed, *["stopped"] * self.stopped]
        return f"{self.tool:9} {self.file:22} {', '.join(words):38} -k '{self.choice}'"


def read(tool: str, file: str, choice: str, output: str) -> Result:
    """What the output of compute-sanitizer and pytest says."""
    summary, passed = re.findall(SUMMARY[tool], output), re.findall(r"(\d+) passed", output)
    ended = re.findall(r"PYTEST ENDED (\d+)", output)
    stopped = ended[-1:] == [str(int(pytest.ExitCode.INTERRUPTED))]
    failed = not stopped and ended[-1:] != [str(int(pytest.ExitCode.OK))]
    found, count = int(summary[-1]) if summary else None, int(passed[-1]) if passed else 0
    return Result(tool, file, choice, found, count, failed, stopped)


def run_job(tool: str, file: str, choice: str, seconds: int, logs: Path) -> Result:
    command = ["compute-sanitizer", "--target-processes", "all", "--tool", tool, "--print-limit", "5"]
    if tool == "memcheck":  # cuda-bindings asks the driver for functions that it may not have
        command += ["--report-api-errors", "no"]
    tests = [f"tests/{file}.py", "-k", choice]
    child = [sys.executable, "-m", "tests.sanitize", "--child", str(seconds), *tests]
    with (logs / f"{tool}-{file}-{re.sub('[^a-z0-9]+', '-', choice)}.txt").open("w+") as log:
        # Ended by its time limit, it prints no summary, which the result says.
        run_in_time(shlex.join([*command, *child]), log, seconds + GRACE_S)
        log.seek(0)
        return read(tool, file, choice, log.read())


def run_tests(seconds: int, arguments: Sequence[str]) -> int:
    """The child: pytest, until an alarm."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    code = int(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *arguments]))
    print(f"PYTEST ENDED {code}", flush=True)
    return code


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--child"]:
        return run_tests(int(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the logs and summary.txt")
    parser.add_argument("--seconds", type=int, default=150, help="of a job's tests")
    parser.add_argument("--workers", type=int, default=8, help="jobs at once")
    parser.add_argument("--only", choices=sorted(SUMMARY), help="one tool; by default both")
    options = parser.parse_args(arguments)
    if shutil.which("compute-sanitizer") is None or not torch.cuda.is_available():
        print("error: needs a CUDA GPU, and compute-sanitizer on the PATH (CUDA toolkit)", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [(tool, *job) for tool in SUMMARY if options.only in (None, tool) for job in JOBS]
    with ThreadPoolExecutor(options.workers) as pool:
        running = [pool.submit(run_job, *job, options.seconds, options.out) for job in jobs]
        results = [job.result() for job in running]
    bad = [result for result in results if result.found != 0 or result.failed]
    text = "\n".join(
        [*(result.line() for result in results), f"{len(bad)} of {len(results)} jobs are not clean"]
    )
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
