"""The command that runs all measurements: its commands exist, and one that fails or hangs stops no other."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from offload_runtime.bench import reproduce
from offload_runtime.bench.reproduce import STEPS, Step, main

ROOT = Path(__file__).resolve().parent.parent


def run_main(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@cache
def help_of(module: str, command: str | None) -> str:
    asked = [sys.executable, "-m", module, *([command] if command else []), "--help"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_options_of_every_command_exist(step):
    if step.name == "longbench":
        pytest.importorskip("rouge_score", reason="needs rouge-score (the extra eval)")
    for command in step.commands:
        module = re.match(r"-m (\S+)", command)[1]
        words = re.findall(r" (--[a-z0-9-]+)", command)
        text = help_of(module, command.split()[2] if module == "offload_runtime" else None)
        for word in words:
            assert word in text, (command, word)


def test_failures_and_missing_inputs_stop_nothing(monkeypatch, tmp_path, capsys):
    steps = (
        Step("hangs", 1, ("-c 'import time; time.sleep(60)'",)),
        Step("fails", 9, ("-c 'print(1); raise SystemExit(3)'", "-c 'never'")),
        Step("needs", 9, ("-c 1 {moby}",)),
        Step("works", 9, ("-c 'print(2)'",)),
    )
    monkeypatch.setattr(reproduce, "STEPS", steps)
    assert run_main(monkeypatch, "--out", tmp_path) == 1
    last = capsys.readouterr().out.splitlines()[-4:]
    assert "not done in 1 s" in last[0]
    assert "exit code 3" in last[1]
    assert "left out, there is no moby" in last[2]
    assert "done in" in last[3]
    assert (tmp_path / "logs" / "fails.log").read_text() == "1\n"
    assert run_main(monkeypatch, "--out", tmp_path, "--only", "works") == 0
    assert run_main(monkeypatch, "--out", tmp_path, "--only", "nothing") == 2
