"""make sanitize: what it makes of the output of its tools, and that an alarm ends a job's tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_runtime.bench.machine import ROOT

from . import sanitize
from .sanitize import JOBS, main, read

CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


def test_what_the_output_says():
    ended = read(
        "racecheck", "test_topk", "small", f"33 passed, 4 deselected in 9 s\nPYTEST ENDED 0\n{CLEAN}"
    )
    assert (ended.found, ended.passed, ended.failed, ended.stopped) == (0, 33, False, False)
    alarm = read("racecheck", "test_topk", "small", f"2 passed in 150 s\nPYTEST ENDED 2\n{CLEAN}")
    assert (alarm.found, alarm.passed, alarm.failed, alarm.stopped) == (0, 2, False, True)
    failed = read(
        "memcheck", "test_topk", "small", "1 failed\nPYTEST ENDED 1\n===== ERROR SUMMARY: 12 errors\n"
    )
    assert (failed.found, failed.passed, failed.failed, failed.stopped) == (12, 0, True, False)
    killed = read("memcheck", "test_topk", "small", "....")
    assert killed.found is None
    assert killed.failed


def stand_in(folder: Path, hazards: int) -> None:
    """A compute-sanitizer that runs nothing."""
    tool = folder / "compute-sanitizer"
    summaries = f"ERROR SUMMARY: 0 errors\nRACECHECK SUMMARY: {hazards} hazards displayed\n"
    tool.write_text(f"#!/bin/sh\nprintf '1 passed\\nPYTEST ENDED 0\\n{summaries}'\n")
    tool.chmod(0o755)


@pytest.mark.parametrize("hazards", [0, 3])
def test_jobs_and_their_summary(tmp_path, monkeypatch, capsys, hazards):
    stand_in(tmp_path, hazards)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["--out", str(tmp_path / "logs")]) == (1 if hazards else 0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(JOBS) + 1
    assert lines[-1] == f"{len(JOBS) if hazards else 0} of {2 * len(JOBS)} jobs are not clean"
    assert (tmp_path / "logs" / "summary.txt").read_text().splitlines() == lines


def test_without_the_tool_or_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert main(["--out", str(tmp_path)]) == 2
    assert "compute-sanitizer" in capsys.readouterr().err


def test_every_job_names_a_file_of_tests():
    for file in {file for file, _ in JOBS}:
        assert (ROOT / "tests" / f"{file}.py").is_file()


def test_an_alarm_ends_the_tests(tmp_path):
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\ndef test_one():\n    pass\n\ndef test_two():\n    time.sleep(60)\n")
    command = [sys.executable, "-m", "tests.sanitize", "--child", "5", str(slow), f"--rootdir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=50)
    assert "1 passed" in done.stdout
    assert "PYTEST ENDED 2" in done.stdout
