"""Jobs that are killed, stopped, starved and doubled: the output has the same lines in the end."""

import os
import random
import resource
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from offload_runtime.jobs import JobRun, run_job

from .jobs_fake import FakeModel, make_job
from .jobs_helpers import DOCUMENTS, finish, ids, start, without_times, write_documents

KILLS = 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> bytes:
    """What an uninterrupted job writes."""
    output = tmp_path / "whole.jsonl"
    run_job(make_job(source, output, long="map-reduce"), FakeModel())
    assert len(ids(output)) == DOCUMENTS
    return without_times(output)


def test_thirty_kills_at_random_points(source: Path, expected: bytes, tmp_path: Path) -> None:
    """kill -9 at random moments, over and over; each job ends as if nothing had happened."""
    draw, kills, jobs, places = random.Random(7), 0, 0, set()
    while kills < KILLS:
        output = tmp_path / f"out{jobs}.jsonl"
        code = None
        while code != 0:
            process = start(source, output, "--seconds", "0.01")
            wait_for_start(process)
            time.sleep(draw.uniform(0, 0.25))
            process.kill()
            code = finish(process)[0]
            if code == -signal.SIGKILL:
                kills += 1
                places.add(len(output.read_bytes().split(b"\n")) - 1)
        assert without_times(output) == expected
        jobs += 1
    assert len(places) > 5  # the kills did hit different documents


def wait_for_start(process: subprocess.Popen) -> None:
    """Until the job has listed its documents: kills before that hit Python's imports."""
    assert process.stderr is not None
    process.stderr.readline()


@pytest.mark.parametrize("places", [1, 4])
def test_every_torn_end_is_repaired(tmp_path: Path, places: int) -> None:
    """Whatever number of bytes reached the disk, the next start makes the same file of it."""
    source = write_documents(tmp_path / "few", 6)
    output = tmp_path / "out.jsonl"
    job = make_job(source, output, long="map-reduce")
    run_job(job, FakeModel(places=places))
    whole, plain = output.read_bytes(), without_times(output)
    for size in range(0, len(whole), 29):
        output.write_bytes(whole[:size])
        run_job(job, FakeModel(places=places))
        assert sorted(without_times(output).split(b"\n")) == sorted(plain.split(b"\n"))


def test_the_number_of_places_changes_only_the_order(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "many", 12)
    lines = []
    for places in (1, 3, 8):
        output = tmp_path / f"{places}.jsonl"
        run_job(make_job(source, output, long="map-reduce"), FakeModel(places=places))
        lines.append(without_times(output).split(b"\n"))
    assert lines[0] != lines[1]  # a document of several parts is passed by those after it
    assert sorted(lines[0]) == sorted(lines[1]) == sorted(lines[2])


def test_sigterm_finishes_the_line_and_exits_143(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    process = start(source, output, "--seconds", "1.5")
    wait_for_start(process)
    time.sleep(0.15)
    process.terminate()
    code, _ = finish(process)
    assert code == 143
    assert ids(output) == ["00.txt"]
    assert finish(start(source, output))[0] == 0
    assert without_times(output) == expected


def test_ctrl_c_stops_at_once_with_130(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    # Tests that a script has put into the background inherit a SIGINT that is ignored.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(source, output, "--seconds", "5", preexec_fn=heeded)
    wait_for_start(process)
    time.sleep(0.15)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert output.read_bytes() == b""
    assert finish(start(source, output))[0] == 0
    assert without_times(output) == expected


def test_a_full_disk_loses_nothing(source: Path, expected: bytes, tmp_path: Path) -> None:
    """The file may grow to 2,000 bytes: a line fails half-way, is taken back, and the job says so."""
    output = tmp_path / "out.jsonl"

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    code, errors = finish(start(source, output, preexec_fn=small_disk))
    last = errors.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith(f"RunError: cannot write to {output}: File too large; every finished line is kept")
    assert 2 < len(ids(output)) < DOCUMENTS
    assert finish(start(source, output))[0] == 0
    assert without_times(output) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_tmpfs_loses_nothing(source: Path, expected: bytes, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        output = disk / "out.jsonl"
        code, errors = finish(start(source, output))
        assert code == 1
        assert "No space left on device" in errors.strip().splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert finish(start(source, output))[0] == 0
        assert without_times(output) == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_jobs_on_one_output(source: Path, expected: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    job = make_job(source, output, long="map-reduce")
    with JobRun(job) as run:
        code, errors = finish(start(source, output))
        assert code == 1
        assert errors.startswith(f"UserError: another job is writing to {output}")
        run.run(FakeModel())
    assert without_times(output) == expected
    assert finish(start(source, output))[0] == 0  # the lock went with the job
