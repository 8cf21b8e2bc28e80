"""`ds-offload bench` at toy size on a CPU: rows are complete, comparable, and survive others' failures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench import baselines, compare
from offload_runtime.bench.driven import DrivenSession
from offload_runtime.bench.report import Report
from offload_runtime.bench.request import make_request
from offload_runtime.bench.shapes import random_model
from offload_runtime.cli import app
from offload_runtime.config import RuntimeConfig

QUICK = ("bench", "--quick", "--device", "cpu", "--steps", "2")


def run(*options: str) -> Result:
    return CliRunner().invoke(app, [*QUICK, *options])


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def adapter() -> ModelAdapter:
    return ModelAdapter(random_model("tiny", 1024, "cpu"))


def test_every_row_has_what_it_needs(tmp_path: Path) -> None:
    out = tmp_path / "sub" / "bench.json"
    result = run("--prefetch", "correct,off", "--out", str(out))
    report = report_of(result)
    assert json.loads(out.read_text()) == report
    assert "a step moves" in result.stdout
    assert "measured-locality" in result.stdout
    rows = report["rows"]
    assert {row["what"] for row in rows} == {"dense", "streaming", "hf-dense", "hf-offloaded", "ds-offload"}
    assert [row["error"] for row in rows if row["error"]] == ["needs a CUDA GPU"]
    for row in rows:
        assert row.keys() == rows[0].keys()
        if row["error"]:
            continue
        assert row["tpot_ms"] > 0
        assert row["steps"] == 2
        assert row["vs_dense"] > 0
        assert row["vs_streaming"] > 0
    ours = [row for row in rows if row["what"] == "ds-offload"]
    kinds = {(row["prefetch"], row["new_rows"], row["resident"], row["locality"]) for row in ours}
    assert len(kinds) == len(ours) == 10
    for row in ours:
        fetches_all = row["resident"] == "off" and row["prefetch"] == "off"
        assert (row["moved_of_selected"] == 1) == fetches_all
        assert row["moved_gb"] > 0
    (card,) = report["cost_cards"]
    assert card["kv_gb"] == pytest.approx(8 * 2 * 1024 * 256 * 4 / 1e9)
    assert report["locality"][0]["source"].startswith("tiny-256k")


def test_measured_locality_overlaps_as_measured() -> None:
    options = ("--prefetch", "off", "--new-rows", "none", "--resident", "on", "--baselines", "none")
    rows = report_of(run(*options, "--steps", "6"))["rows"]
    hits = {row["locality"]: 1 - row["moved_of_selected"] for row in rows}
    targets = {row["locality"]: row["target_overlap"] for row in rows}
    assert targets["no-locality"] is None
    # A resident set of twice the budget also keeps older rows: at least the overlap, to sampling noise.
    assert hits["measured-locality"] > targets["measured-locality"] - 0.1
    assert hits["measured-locality"] > hits["no-locality"] + 0.1


def test_driven_selections_overlap_as_asked(adapter: ModelAdapter) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        config = RuntimeConfig(ctx=1024, budget=128, slots=128, prefetch="off")
        session = DrivenSession(adapter, config, 1)
        for overlap in (0.3, 0.8):
            session.restart(40)
            session.drive(overlap)
            session.restart(40)
            session.advance()
            before = session.counted()
            for _ in range(20):
                session.advance()
            now = session.counted()
            fetched = (now["fetched"] - before["fetched"]) / (now["selected"] - before["selected"])
            assert 1 - fetched == pytest.approx(overlap, abs=0.06)


def test_streaming_reads_every_layer_once(adapter: ModelAdapter) -> None:
    """Its attention equals dense attention over the host rows, also across steps."""
    host = [torch.randn(1, 2, 256, 256) for _ in range(8)]
    streaming = baselines.Streaming(host, torch.device("cpu"))
    streaming.fetch(0)
    for layer in [*range(8), *range(8)]:
        part = torch.randn(1, 4, 1, 128), torch.randn(1, 2, 1, 128), torch.randn(1, 2, 1, 128)
        call = baselines.AttentionCall(*part, 0.1)
        rows = host[layer].clone()
        baselines.append(call, rows)
        torch.testing.assert_close(streaming.attend(layer, call), baselines.flash_decode(call, rows))


def test_contexts_and_batches_are_compared() -> None:
    options = ("--ctx", "512,1024", "--batch", "1,2", "--prefetch", "off", "--new-rows", "none")
    report = report_of(run(*options, "--resident", "on", "--locality", "no", "--baselines", "dense"))
    assert len(report["rows"]) == 8
    growth, gain = report["growth"], report["batch_gain"]
    assert {(line["what"], line["from"], line["to"]) for line in growth} >= {("ds-offload", 512, 1024)}
    assert {(line["what"], line["from"], line["to"]) for line in gain} >= {("dense", 1, 2)}
    one, two = (
        next(
            r["tpot_ms"]
            for r in report["rows"]
            if r["what"] == "dense" and (r["ctx"], r["batch"]) == (ctx, 1)
        )
        for ctx in (512, 1024)
    )
    line = next(line for line in growth if line["what"] == "dense" and line["batch"] == 1)
    assert line["ratio"] == pytest.approx(two / one, abs=1e-2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("cannot pin")])
def test_a_row_without_memory_is_recorded_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> list[float]:
        raise error

    monkeypatch.setattr(compare, "dense_times", fail)
    options = ("--prefetch", "off", "--new-rows", "none", "--resident", "on", "--locality", "no")
    rows = report_of(run(*options, "--baselines", "dense,streaming"))["rows"]
    failed = [row for row in rows if row["error"]]
    assert [row["what"] for row in failed] == ["dense"]
    assert "memory" in failed[0]["error"]
    assert all(row["tpot_ms"] > 0 and row["vs_dense"] is None for row in rows if not row["error"])
    assert len(rows) == 3


def test_another_failure_is_recorded_and_ends_in_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[float]:
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(compare, "dense_times", fail)
    result = run("--baselines", "dense", "--prefetch", "off", "--locality", "no", "--resident", "on")
    assert result.exit_code == 1
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [row["error"] for row in rows if row["error"]] == ["failed: a kernel broke"]
    assert len(rows) == 3


def test_a_shape_that_does_not_fit_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    request = make_request({"shape": "mixtral-8x7b"}, True, "cpu")
    report = Report(tmp_path / "out.json", {})
    compare.Comparison(request, report, compare.Ceilings(None, None), [], lambda _: None).run(lambda _: None)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "weights of 186" in row["error"]  # 46.7 billion parameters of 4 bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shape", "gpt-9"), ("gpt-9", "llama-3.1-8b")),
        (("--ctx", "0"), ("--ctx", "256")),
        (("--ctx", "many"), ("--ctx", "many")),
        (("--ctx", "512", "--budget", "513"), ("513", "512")),
        (("--budget", "0"), ("budget",)),
        (("--budget", "128,,256"), ("--budget", "commas")),
        (("--prefetch", "maybe"), ("maybe", "correct")),
        (("--new-rows", "few"), ("new_rows", "few")),
        (("--locality", "some"), ("some", "measured")),
        (("--baselines", "vllm"), ("vllm", "streaming")),
        (("--resident", "half"), ("half",)),
        (("--batch", "0"), ("--batch",)),
        (("--steps", "0"), ("--steps",)),
        (("--text", "no.txt"), ("no.txt",)),
        (("--locality-model", "nowhere"), ("nowhere",)),
    ],
)
def test_bad_input_is_one_line(options: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
