"""Documents, processes and outputs for the tests of jobs."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "jobs_fake.py"
DOCUMENTS = 24
TIMES = ("seconds", "ttft_s", "tpot_s")


def write_documents(folder: Path, count: int = DOCUMENTS) -> Path:
    """Short documents, and every fifth one too long for ctx."""
    folder.mkdir()
    for index in range(count):
        words = 400 if index % 5 == 4 else 10 + index
        text = "\n\n".join(f"paragraph {i} of document {index} says so ." for i in range(words // 7 + 1))
        (folder / f"{index:02d}.txt").write_text(text)
    return folder


def start(source: Path, output: Path, *options: str, **popen: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(source), str(output), *options],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def environment() -> dict[str, str]:
    """This process's, with the checkout on the path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def without_times(output: Path) -> bytes:
    """The output's bytes with the timings taken out of every line."""
    lines = []
    for line in output.read_bytes().split(b"\n")[:-1]:
        record = json.loads(line)
        for name in TIMES:
            assert name in record
            record[name] = 0
        lines.append(json.dumps(record, ensure_ascii=False).encode())
    assert output.read_bytes().endswith(b"\n")
    return b"\n".join(lines)


def ids(output: Path) -> list[str]:
    return [json.loads(line)["id"] for line in output.read_text().split("\n")[:-1]]
