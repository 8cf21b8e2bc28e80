"""The batch commands and the embedded model: options, refusals, one real kill, real batches."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_runtime import OffloadedModel, RuntimeConfig, cli_batch_run
from offload_runtime import cli_options as opt
from offload_runtime.cli import app
from offload_runtime.cli_batch_run import calibration_digest
from offload_runtime.demo import shipped_prose
from offload_runtime.jobs.model_answers import ModelAnswerer

from .jobs_helpers import ROOT, environment, without_times

EMBEDDED = ROOT / "offload_runtime" / "data" / "tiny-256k"
OPTIONS = ["--ctx", "700", "--budget", "64", "--max-new-tokens", "6", "--device", "cpu"]


def write_job(folder: Path) -> list[str]:
    """Four short documents, one that is too long, one that is empty; the options of a job over them."""
    source = folder / "docs"
    source.mkdir()
    for index in range(4):
        (source / f"{index}.txt").write_text(shipped_prose()[index * 300 : index * 300 + 250])
    (source / "4.txt").write_text(shipped_prose()[3000:4200])
    (source / "5.txt").write_text("")
    (folder / "template.txt").write_text("Text: {document}\nSummary:")
    template = str(folder / "template.txt")
    names = ["--prompt-template", template, "--combine-template", template]
    return ["summarize", "--input", str(source), *names, *OPTIONS]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stderr


def signalled(after: str, number: int, *arguments: str) -> int:
    """The exit code of a command that gets a signal as soon as `after` is in its log."""
    process = subprocess.Popen(
        [sys.executable, "-m", "offload_runtime", *arguments],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if after in line:
            process.send_signal(number)
            break
    process.communicate(timeout=120)
    return process.returncode


def test_a_stopped_and_killed_job_goes_on_to_the_same_output(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    code, errors = run(*job, "--output", str(whole))
    assert code == 1  # one document is empty
    assert "5.txt is empty" in errors
    assert signalled("[1/6]", signal.SIGTERM, *job, "--output", str(killed)) == 143
    stopped = killed.read_text().count("\n")
    assert 1 <= stopped < 4
    first = f"[1/{6 - stopped}]"
    assert signalled(first, signal.SIGKILL, *job, "--output", str(killed)) == -signal.SIGKILL
    done = killed.read_text().count("\n")
    assert stopped < done < 6
    code, errors = run(*job, "--output", str(killed))
    assert code == 1
    assert f"{6 - done} documents to do" in errors
    assert without_times(killed) == without_times(whole)
    part = json.loads(whole.read_text().split("\n")[4])
    assert part["fitted"]["method"] == "map-reduce"
    assert part["hit_rate"] > 0
    assert part["gather_gb"] > 0


def test_nothing_left_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = [*write_job(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    (tmp_path / "docs").rename(tmp_path / "all")
    (tmp_path / "docs").mkdir()
    (tmp_path / "all" / "0.txt").rename(tmp_path / "docs" / "0.txt")
    assert run(*job)[0] == 0
    monkeypatch.setattr(OffloadedModel, "from_pretrained", None)
    code, errors = run(*job)
    assert code == 0
    assert "1 / 0 / 0" in errors
    assert run(*job, "--quiet") == (0, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--input", "/nothing"], "no file or folder"),
        (["--prompt-template", "/nothing"], "no file /nothing"),
        (["--long", "burn"], "choose one of refuse"),
        (["--places", "none"], "--places is 'none'"),
        (["--shard", "3/2"], "--shard is '3/2'"),
        (["--ctx", "70", "--max-new-tokens", "30"], "leaves 40 tokens for a prompt"),
        (["--chat"], "no chat template"),
        (["--budget", "0"], "budget 0 is not above 0"),
        (["--output", "/nothing/out.jsonl"], "cannot be written"),
        (["--metrics-port", "99999999"], "--metrics-port 99999999"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, change: list[str], message: str) -> None:
    if change[0] == "--metrics-port":
        pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    code, errors = run(*write_job(tmp_path), "--output", str(tmp_path / "out.jsonl"), *change)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_a_job_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    (tmp_path / "docs" / "big.pdf").write_bytes(b"%PDF")  # of unknown length: planned for ctx
    pytest.importorskip("pypdf", reason="the extra `docs` is not installed")
    code, errors = run(*job, "--output", str(tmp_path / "o.jsonl"), "--ctx", "200000", "--places", "100000")
    assert code == 1
    assert "100000 x 200000 tokens need" in errors


@pytest.fixture(scope="module")
def model() -> OffloadedModel:
    return OffloadedModel.from_pretrained(EMBEDDED, ctx=1024, budget="1/1", device="cpu")


def ignore(stage: str, done: int, total: int) -> None:
    pass


def test_a_batch_answers_like_its_documents_alone(model: OffloadedModel) -> None:
    prose = shipped_prose()
    prompts = [prose[:120], prose[500:800], prose[1000:1040]]
    answerer = ModelAnswerer(model)
    together = ModelAnswerer(model, places=3).answer(prompts, 5, ignore)
    alone = [answerer.answer([prompt], 5, ignore)[0] for prompt in prompts]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.prompt_tokens for answer in together] == [121, 301, 41]  # a byte a token, one <bos>
    assert [answer.new_tokens for answer in together] == [5, 5, 5]


def test_each_sequence_ends_at_its_own_end_token(model: OffloadedModel) -> None:
    prose = shipped_prose()
    prompts = [prose[:120], prose[1000:1040]]  # the second one's answer has not the first one's first token
    answerer = ModelAnswerer(model)
    ids = model.tokenizer(prompts[0], return_tensors="pt").input_ids
    first = int(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    ended = ModelAnswerer(model, sampling={"do_sample": False, "eos_token_id": first})
    answers = ended.answer(prompts, 5, ignore)
    plain = answerer.answer(prompts, 5, ignore)
    assert answers[0].new_tokens == 1
    assert answers[0].finish_reason == "stop"
    assert plain[0].finish_reason == "length"
    assert answers[1].finish_reason == "length"
    assert answers[1].text == plain[1].text


def test_stages_and_figures(model: OffloadedModel) -> None:
    seen: list[tuple[str, int, int]] = []
    answer = ModelAnswerer(model).answer(["some text"], 4, lambda *stage: seen.append(stage))[0]
    layers = model.model.config.num_hidden_layers
    assert ("prefill", 10 * layers, 10 * layers) in seen
    assert [stage for stage in seen if stage[0] == "decode"] == [("decode", i, 4) for i in (1, 2, 3, 4)]
    assert answer.ttft_s > 0
    assert answer.tpot_s > 0
    assert answer.pinned_gb > 0
    assert (answer.gpu_peak_gb is None) == (model.model.device.type == "cpu")


def test_a_chat_template_is_used(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = ModelAnswerer(model, chat=True)
    template = "<bos>U: {{ messages[0].content }}\nA:"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert answerer.count("xy") == 1 + len("U: xy\nA:")


def test_another_calibration_is_another_setting(tmp_path: Path) -> None:
    source = opt.ModelSource(str(tmp_path), "cpu", None, None, None, False)
    assert calibration_digest(source, RuntimeConfig()) is None
    (tmp_path / "calibration.safetensors").write_bytes(b"maps")
    own = calibration_digest(source, RuntimeConfig())
    (tmp_path / "other").write_bytes(b"other maps")
    given = calibration_digest(source, RuntimeConfig(calibration=str(tmp_path / "other")))
    assert len({None, own, given}) == 3


def test_places_change_only_times_and_order(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    lines = []
    for places in ("1", "3"):
        output = tmp_path / f"{places}.jsonl"
        assert run(*job, "--output", str(output), "--places", places)[0] == 1  # one document is empty
        lines.append(without_times(output).split(b"\n"))
    assert sorted(lines[0]) == sorted(lines[1])


def test_places_of_different_sizes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places for documents of 300 and 5,000 bytes are of two sizes where that saves memory."""
    source, seen = tmp_path / "docs", []
    source.mkdir()
    for index, size in enumerate((300, 5000, 280, 310)):
        (source / f"{index}.txt").write_text(shipped_prose()[index * 300 : index * 300 + size])
    options = ["--ctx", "8192", "--budget", "64", "--max-new-tokens", "4", "--device", "cpu"]
    job = ["summarize", "--input", str(source), *options]
    plain = OffloadedModel.continuous

    def continuous(self, places, tokens, prompt=None, overlap=True, place_tokens=()):
        seen.append(place_tokens)
        return plain(self, places, tokens, prompt, overlap, place_tokens)

    monkeypatch.setattr(OffloadedModel, "continuous", continuous)
    monkeypatch.setattr(cli_batch_run, "managed_available", lambda _: True)
    lines = []
    for places in ("1", "4"):
        output = tmp_path / f"{places}.jsonl"
        assert run(*job, "--output", str(output), "--places", places)[0] == 0
        lines.append(sorted(without_times(output).split(b"\n")))
    assert lines[0] == lines[1]
    alone, sized = seen
    assert alone == ()
    assert sized[3] == 4096  # there is memory for two more of the largest
    assert 5000 < sized[0] == sized[1] == sized[2] <= 8192
