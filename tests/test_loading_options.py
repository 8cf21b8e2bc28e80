"""Every command that loads a model has the same options of loading, and they reach transformers' loaders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner, Result

from offload_runtime import cli_model, loading
from offload_runtime.cli import app
from offload_runtime.model_check import embedded_model
from offload_runtime.model_source import ModelSource

LOADING = (
    "--dtype", "--revision", "--token", "--trust-remote-code", "--rope-scaling", "--quantize", "--gguf-file",
)  # fmt: skip
LOADERS = ("generate", "chat", "calibrate", "eval", "batch", "summarize")
GIVEN = ("--dtype", "float16", "--revision", "r1", "--token", "t1", "--trust-remote-code")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model with a chat template, and without its calibration file."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded_model()) / name, folder)
    file = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder


def run(command: str, model: Path, *more: str) -> Result:
    """The command on a small text."""
    text = model.parent / "text.txt"
    text.write_text("The town of Brill lies on the river Tamsel. " * 20)
    out = model.parent / "out"
    arguments = {
        "generate": ["--prompt", "hello", "--max-new-tokens", "2"],
        "chat": [],
        "plan": ["--ctx", "1024"],
        "calibrate": [str(text), "--out", f"{out}.safetensors", "--tokens", "128"],
        "eval": ["bits", "--out", str(out), "--ctx", "128", "--tokens", "4", "--text", str(text)],
        "batch": ["--input", str(text), "--output", f"{out}.jsonl", "--prompt-template", "summarize"],
        "summarize": ["--input", str(text), "--output", f"{out}.jsonl"],
    }[command]
    device = ["--model", str(model), "--device", "cpu"]
    return CliRunner().invoke(app, [command, *arguments, *device, *more], input="")


@pytest.mark.parametrize("command", [*LOADERS, "plan"])
def test_every_command_offers_every_option(command):
    known = {opt for part in typer.main.get_command(app).commands[command].params for opt in part.opts}
    assert set(LOADING) <= known


class Seen:
    """What transformers' loaders were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, list[dict[str, Any]]] = {}
        for kind in ("AutoConfig", "AutoTokenizer"):
            self.watch(monkeypatch, kind, getattr(transformers, kind).from_pretrained)
        self.watch(monkeypatch, "AutoModelForCausalLM", self.refuse)

    def watch(self, monkeypatch: pytest.MonkeyPatch, kind: str, plain: Any) -> None:
        def load(name: str, *_: Any, **keywords: Any) -> Any:
            self.calls.setdefault(kind, []).append(keywords)
            return plain(name, **keywords)

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", load)

    def refuse(self, *_: Any, **__: Any) -> None:
        raise OSError("seen enough")


@pytest.mark.parametrize("command", LOADERS)
def test_options_reach_the_loaders(command, model, monkeypatch):
    seen = Seen(monkeypatch)
    result = run(command, model, *GIVEN, "--rope-scaling", "yarn:4")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(f"cannot load model {model}: seen enough")
    assert "expect lower quality" in result.stderr
    weights = seen.calls["AutoModelForCausalLM"][-1]
    assert weights["dtype"] in (torch.float16, "float16")
    assert weights["config"].rope_parameters["rope_type"] == "yarn"
    # A calibration's text is tokenised after the weights are there.
    for kind in seen.calls:
        for call in seen.calls[kind]:
            assert (call["revision"], call["token"], call["trust_remote_code"]) == ("r1", "t1", True)
    assert ("AutoTokenizer" in seen.calls) == (command != "calibrate")


@pytest.mark.parametrize("command", LOADERS)
def test_quantize_reaches_the_loaders(command, model, monkeypatch):
    """Without the package: transformers' own config for it is stood in for."""
    for module in (loading, cli_model):
        monkeypatch.setattr(module, "quantisation", lambda wanted, *_: f"config of {wanted}")
    monkeypatch.setattr(loading, "require_package", lambda *_: None)
    seen = Seen(monkeypatch)
    result = run(command, model, "--quantize", "bnb-4bit")
    assert result.stderr.splitlines()[-1].endswith("seen enough")
    assert seen.calls["AutoModelForCausalLM"][-1]["quantization_config"] == "config of bnb-4bit"


@pytest.mark.parametrize("command", [*LOADERS, "plan"])
def test_what_cannot_be_loaded_is_one_line_in_every_command(command, model):
    for options, words in (
        (("--gguf-file", "absent.gguf"), "there is no file absent.gguf in"),
        (("--quantize", "q4"), "choose one of bnb-4bit, torchao-int8"),
        (("--rope-scaling", "ntk:4"), "yarn:4 or linear:4"),
        (("--dtype", "int8"), "--dtype is 'int8'"),
    ):
        result = run(command, model, *options)
        assert result.exit_code == 2, result.stderr
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", LOADERS)
def test_a_missing_tokenizer_is_one_line_in_every_command(command, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    result = run(command, model)
    assert result.exit_code == 2, result.stderr
    assert "has no usable tokenizer: none of its files is one (tokenizer.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_results_of_another_form_have_another_name():
    plain = ModelSource("org/name", "cpu", None)
    assert plain.label == "name"
    assert ModelSource("org/name", "cpu", None, quantize="bnb-4bit").label == "name-bnb-4bit"
    told = ModelSource("org/name", "cpu", "float16", revision="pr/1", rope_scaling="yarn:4")
    assert told.label == "name-pr-1-float16-yarn-4"


def test_stretched_model_is_calibrated_into_a_file_of_its_own(model):
    """The file in the model's directory is for the model as it is, and a stretched one does not take it."""
    result = run("calibrate", model)
    assert result.exit_code == 0, result.stderr
    own = (model.parent / "out.safetensors").rename(model / "calibration.safetensors")
    scaled = ("--rope-scaling", "yarn:2", "--calibration", str(model.parent / "out.safetensors"))
    assert run("calibrate", model, *scaled[:2]).exit_code == 0
    assert run("generate", model, *scaled).exit_code == 0
    assert run("generate", model, *scaled[:2]).exit_code == 0  # takes its labels from the prompt
    refused = run("generate", model, *scaled[2:])
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    text = str(model.parent / "text.txt")
    nowhere = CliRunner().invoke(app, ["calibrate", text, "--model", str(model), *scaled[:2]])
    assert (nowhere.exit_code, "--out FILE" in nowhere.stderr) == (2, True)
    assert own.is_file()


@pytest.mark.parametrize("command", ["eval", "batch"])
def test_a_stretched_model_runs(command, model):
    shutil.copy(Path(embedded_model()) / "calibration.safetensors", model)  # not for this one
    few = ["--max-new-tokens", "2", "--ctx", "4096"] if command == "batch" else []
    result = run(command, model, "--rope-scaling", "yarn:2", *few)
    assert result.exit_code == 0, result.stderr
