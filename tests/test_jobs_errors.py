"""Documents, inputs and outputs that are not what they should be: one line each, and nothing lost."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offload_runtime.errors import RunError, UserError
from offload_runtime.jobs import JobRun, run_job
from offload_runtime.jobs.output import OutputFile

from .jobs_fake import FakeModel, make_job
from .jobs_helpers import DOCUMENTS, ids, write_documents


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


def test_a_failing_document_is_a_line_and_the_job_goes_on(source: Path, tmp_path: Path) -> None:
    (source / "02.txt").write_text("poison")
    (source / "03.txt").write_text("   ")
    (source / "06.txt").write_bytes(b"\xff\xfe\x00binary")
    output = tmp_path / "out.jsonl"
    model = FakeModel(failures={"poison": ValueError("a worker's\nmistake"), "400": MemoryError()})
    summary = run_job(make_job(source, output, long="map-reduce"), model)
    records = {r["id"]: r for r in map(json.loads, output.read_text().split("\n")[:-1])}
    assert len(records) == DOCUMENTS
    assert records["02.txt"]["error"] == "ValueError: a worker's mistake"
    assert records["03.txt"]["error"].endswith("03.txt is empty")
    assert "not UTF-8" in records["06.txt"]["error"]
    assert records["02.txt"]["text"] is None
    assert summary.failed == 3
    assert model.released == 1  # only the model's own failure can have left memory behind


def test_failed_documents_are_tried_again_on_request(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    poisoned = (source / "02.txt").read_text()
    (source / "02.txt").write_text("poison")
    job = make_job(source, output, long="map-reduce")
    failing = FakeModel(failures={"poison": ValueError("no")})
    assert run_job(job, failing).failed == 1
    again = FakeModel()
    assert run_job(job, again).failed == 1
    assert again.most == 0  # not without --retry-failed
    (source / "02.txt").write_text(poisoned)
    summary = run_job(make_job(source, output, long="map-reduce", retry_failed=True), again)
    assert (summary.failed, summary.written) == (0, 1)
    assert again.most == 1
    assert sorted(ids(output)) == sorted(f"{i:02d}.txt" for i in range(DOCUMENTS))


def test_max_errors_ends_the_job(source: Path, tmp_path: Path) -> None:
    for index in (1, 2, 3):
        (source / f"0{index}.txt").write_text("")
    output = tmp_path / "out.jsonl"
    with pytest.raises(RunError, match="3 documents failed, more than --max-errors 2"):
        run_job(make_job(source, output, max_errors=2), FakeModel())
    assert ids(output) == ["00.txt", "01.txt", "02.txt", "03.txt"]


@pytest.mark.parametrize("long", ["cut-tail", "map-reduce"])
@pytest.mark.parametrize("when", ["failures", "failures_together"])
def test_one_bad_document_does_not_spoil_those_beside_it(
    source: Path, tmp_path: Path, when: str, long: str
) -> None:
    """Where all fail at once, each is tried alone and one is to blame."""
    (source / "02.txt").write_text("poison")
    (source / "04.txt").write_text("poison " + "word " * 500)  # several parts when it is map-reduced
    output = tmp_path / "out.jsonl"
    model = FakeModel(places=8, **{when: {"poison": MemoryError()}})
    summary = run_job(make_job(source, output, long=long), model)
    assert summary.written == DOCUMENTS
    assert summary.failed == 2
    assert sorted(ids(output)) == [f"{i:02d}.txt" for i in range(DOCUMENTS)]
    assert model.most == 8
    assert not model.prompts


def test_a_broken_gpu_ends_the_job_without_a_line(source: Path, tmp_path: Path) -> None:
    (source / "02.txt").write_text("poison")
    output = tmp_path / "out.jsonl"
    model = FakeModel(failures={"poison": RuntimeError("CUDA error: an illegal memory access")})
    with pytest.raises(RunError, match="the GPU failed"):
        run_job(make_job(source, output), model)
    assert ids(output) == ["00.txt", "01.txt"]


def test_a_file_removed_mid_run_is_an_error_line(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with JobRun(make_job(source, output, long="map-reduce")) as run:
        (source / "05.txt").unlink()
        summary = run.run(FakeModel())
    assert summary.failed == 1
    record = json.loads(output.read_text().split("\n")[5])
    assert record["id"] == "05.txt"
    assert "No such file" in record["error"]


def test_a_jsonl_that_changes_mid_run_ends_the_job(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(4)]
    source.write_text("".join(lines))
    with JobRun(make_job(source, output)) as run:
        source.write_text("".join([lines[0], lines[1].replace("text 1", "text X"), *lines[2:]]))
        with pytest.raises(RunError, match=r"line 2 of .* changed while the job ran"):
            run.run(FakeModel())
    assert ids(output) == ["d0"]
    run_job(make_job(source, output), FakeModel())
    assert ids(output) == ["d0", "d1", "d2", "d3"]


def test_a_jsonl_that_only_grows_is_fine(tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "text": "one"}\n')
    with JobRun(make_job(source, output)) as run:
        with source.open("a") as file:
            file.write('{"id": "b", "text": "two"}\n')
        run.run(FakeModel())
    assert ids(output) == ["a"]
    run_job(make_job(source, output), FakeModel())
    assert ids(output) == ["a", "b"]


def test_a_read_only_output_is_one_line(source: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # tmp_path's parents are closed to others
        folder = Path(name)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(UserError, match="cannot be written: Permission denied"):
            OutputFile(folder / "out.jsonl", {})
        folder.chmod(0o755)
        with as_nobody(), pytest.raises(UserError, match="cannot be written"):
            OutputFile(folder / "no" / "out.jsonl", {})


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere, so as root a test drops its rights for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_output_that_is_removed_ends_the_job(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with JobRun(make_job(source, output)) as run:
        output.rename(tmp_path / "elsewhere.jsonl")
        with pytest.raises(RunError, match="was removed or replaced"):
            run.run(FakeModel())


def test_the_lock_survives_a_retry(tmp_path: Path) -> None:
    """--retry-failed puts a new file in the output's place; the lock has to move along."""
    output = tmp_path / "out.jsonl"
    with OutputFile(output, {"a": 1}) as first:
        first.append([{"id": "x", "error": "no"}, {"id": "y", "error": None}])
    with OutputFile(output, {"a": 1}, retry_failed=True) as second:
        assert second.done == {"y"}
        with pytest.raises(UserError, match="another job"):
            OutputFile(output, {"a": 1})


def test_other_settings_are_refused_unless_forced(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run_job(make_job(source, output), FakeModel())
    before = output.read_bytes()
    other = {"max_new_tokens": 30}
    with pytest.raises(UserError, match=r"other settings \(max_new_tokens: 20, now 30\)"):
        run_job(make_job(source, output, **other), FakeModel())
    assert output.read_bytes() == before
    run_job(make_job(source, output, force=True, **other), FakeModel())
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["settings"]["max_new_tokens"] == 30
    assert [old["max_new_tokens"] for old in meta["earlier_settings"]] == [20]


def test_a_file_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("my notes, no newline")
    with pytest.raises(UserError, match=r"has lines but no out\.jsonl\.meta\.json"):
        run_job(make_job(source, output), FakeModel())
    assert output.read_text() == "my notes, no newline"
