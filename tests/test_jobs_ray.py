"""The same job on a local Ray: the same lines, one actor dying on the way, and errors in one line."""

import functools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_runtime.errors import RunError, UserError
from offload_runtime.jobs import JobRun, run_job
from offload_runtime.jobs.answers import OnStage

from .jobs_fake import FakeModel, make_job
from .jobs_helpers import write_documents
from .test_cli_batch import run as run_command
from .test_cli_batch import write_job

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytest.importorskip("ray.data", reason="the extra `ray` is not installed")

from offload_runtime.jobs.ray_job import Load, run_on_ray  # noqa: E402

DOCUMENTS = 8


class DyingModel(FakeModel):
    """Kills its process with the first document it gets, once in all."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def start(self, key: Any, prompt: str, max_new_tokens: int, on_stage: OnStage) -> None:
        if not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().start(key, prompt, max_new_tokens, on_stage)


def no_model() -> FakeModel:
    raise UserError("there is no such model")


def broken_gpu() -> FakeModel:
    return FakeModel(failures={"0": RuntimeError("CUDA error: an illegal memory access")})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False)
    yield
    ray.shutdown()


def texts(output: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["text"] for line in lines}


def test_ray_writes_the_same_lines(cluster: None, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "docs", DOCUMENTS)
    run_job(make_job(source, tmp_path / "plain.jsonl", long="map-reduce"), FakeModel())
    output = tmp_path / "out.jsonl"
    with JobRun(make_job(source, output, long="map-reduce")) as run:
        summary = run_on_ray(run, FakeModel, actors=2)
    assert summary.written == DOCUMENTS
    assert texts(output) == texts(tmp_path / "plain.jsonl")
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    with JobRun(make_job(source, output, long="map-reduce")) as run:
        assert run_on_ray(run, FakeModel, actors=2).written == DOCUMENTS - 5
    assert texts(output) == texts(tmp_path / "plain.jsonl")


def test_a_killed_actor_is_started_again(cluster: None, tmp_path: Path) -> None:
    source, output = write_documents(tmp_path / "docs", DOCUMENTS), tmp_path / "out.jsonl"
    with JobRun(make_job(source, output, long="map-reduce")) as run:
        summary = run_on_ray(run, functools.partial(DyingModel, tmp_path / "died"), actors=2)
    assert (tmp_path / "died").exists()
    assert (summary.written, summary.failed) == (DOCUMENTS, 0)
    assert len(texts(output)) == DOCUMENTS


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [(no_model, UserError, "^there is no such model$"), (broken_gpu, RunError, "^the GPU failed: ")],
)
def test_an_actors_error_is_one_line(
    cluster: None, tmp_path: Path, load: Load, error: type[Exception], message: str
) -> None:
    source = write_documents(tmp_path / "docs", 2)
    with JobRun(make_job(source, tmp_path / "out.jsonl")) as run, pytest.raises(error, match=message):
        run_on_ray(run, load, actors=1)


def test_the_command_with_the_embedded_model(cluster: None, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plain, spread = tmp_path / "plain.jsonl", tmp_path / "ray.jsonl"
    assert run_command(*job, "--output", str(plain))[0] == 1  # one document is empty
    code, errors = run_command(*job, "--output", str(spread), "--ray-actors", "1")
    assert code == 1
    assert "5.txt is empty" in errors
    assert texts(spread) == texts(plain)
