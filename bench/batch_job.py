"""A night's job in small: passages of books through `ds-offload batch`, once whole and once killed.

    python -m bench.batch_job --texts moby_dick.txt war_and_peace.txt --out bench/results/batch_job.json

The documents are consecutive passages of the books, 50,000 bytes up to ctx long
(a byte is a token of the embedded model; other models make fewer tokens of
them). The second run is killed with SIGKILL at random times and started again
until it is through; its lines must be those of the first.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from offload_runtime.bench.machine import ROOT, machine

TEMPLATE = "{document}\n\nIn short:"
TIMES = ("seconds", "ttft_s", "tpot_s")
SPARE_TOKENS = 256  # for the template, <bos> and a passage that is cut at the end of a paragraph


def write_documents(folder: Path, texts: list[Path], count: int, shortest: int, longest: int) -> list[int]:
    """`count` passages, their lengths spread evenly from shortest to longest; returns their bytes."""
    books = [path.read_text(encoding="utf-8").encode() for path in texts]
    sizes = [shortest + (longest - shortest) * index // max(1, count - 1) for index in range(count)]
    places = [0] * len(books)
    written = []
    folder.mkdir(parents=True)
    for index, size in enumerate(sizes):
        book = index % len(books)
        if places[book] + size > len(books[book]):
            raise SystemExit(
                f"{texts[book]} is too short for its share; give more --texts or fewer --documents"
            )
        passage = books[book][places[book] : places[book] + size].decode("utf-8", "ignore")
        passage = passage[: passage.rfind("\n\n") + 1 or None]
        places[book] += size
        (folder / f"{index:03d}-{texts[book].stem}.txt").write_text(passage, encoding="utf-8")
        written.append(len(passage.encode()))
    return written


def run(command: list[str], log: Path, kill_after: float | None = None) -> int:
    """The command's exit code; a negative one when it was killed after so many seconds."""
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, stderr=file)
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n")[:-1]]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By id: with several places lines come in the order of completion."""
    return sorted(records, key=lambda record: record["id"])


def killed_run(
    command: list[str], output: Path, log: Path, kills: int, loading_s: float, work_s: float
) -> dict[str, Any]:
    """Run with kills at random times after the model has loaded, then to the end."""
    draw, landed, lines = random.Random(0), 0, []
    for _ in range(kills):
        if run(command, log, loading_s + draw.uniform(0, 1.2) * work_s / (kills + 1)) < 0:
            landed += 1
            lines.append(output.read_bytes().count(b"\n") if output.exists() else 0)
    code = run(command, log)
    return {"kills": landed, "lines_when_killed": lines, "exit_code": code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--shortest", type=int, default=50_000)
    parser.add_argument("--ctx", type=int, default=262_144)
    parser.add_argument("--budget", default="1/16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--places", default="auto")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, default=Path("batch_job"), help="a folder to make, for the files"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    work = options.work.resolve()
    longest = options.ctx - options.max_new_tokens - SPARE_TOKENS
    texts = [path.resolve() for path in options.texts]
    sizes = write_documents(work / "docs", texts, options.documents, options.shortest, longest)
    template, log = work / "template.txt", work / "log.txt"
    template.write_text(TEMPLATE)
    command = [
        sys.executable, "-m", "offload_runtime", "batch", "--input", str(work / "docs"),
        "--prompt-template", str(template), "--ctx", str(options.ctx), "--budget", options.budget,
        "--max-new-tokens", str(options.max_new_tokens), "--places", options.places,
        *(["--model", options.model] if options.model else []),
    ]  # fmt: skip
    started = time.perf_counter()
    code = run([*command, "--output", str(work / "whole.jsonl")], log)
    seconds = time.perf_counter() - started
    records = read(work / "whole.jsonl")
    work_s = min(seconds, sum(record["seconds"] for record in records))
    loading_s = max(0, seconds - work_s)
    output = work / "killed.jsonl"
    killed = killed_run([*command, "--output", str(output)], output, log, options.kills, loading_s, work_s)
    again = read(output)
    report = {
        "job": {
            name: str(value) for name, value in vars(options).items() if name not in ("work", "texts", "out")
        },
        "machine": machine(),
        "exit_code": code,
        "documents": len(records),
        "failed": sum(1 for record in records if record["error"]),
        "document_bytes": {"least": min(sizes), "most": max(sizes), "all": sum(sizes)},
        "seconds_with_loading": round(seconds, 1),
        "seconds_of_work": round(work_s, 1),
        "documents_per_hour": round(3600 * len(records) / work_s, 1),
        "killed_run": {
            **killed,
            "same_lines": in_order(without_times(again)) == in_order(without_times(records)),
            "same_ids": [record["id"] for record in in_order(again)]
            == [record["id"] for record in in_order(records)],
        },
        "lines": [{name: value for name, value in record.items() if name != "text"} for record in records],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name not in ("lines", "machine")}))


if __name__ == "__main__":
    main()
