"""The command line: bad input ends in one line and an exit code, good input in text on stdout."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, T5Config
from typer.testing import CliRunner, Result

from offload_runtime import cli_model
from offload_runtime.cli import app
from offload_runtime.config import RuntimeConfig
from offload_runtime.memory import FreeMemory
from offload_runtime.model_check import load_config
from offload_runtime.planner import make_plan
from offload_runtime.speed import Rates

ROOT = Path(__file__).resolve().parent.parent
RUNNER = CliRunner()


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return RUNNER.invoke(app, list(arguments), input=stdin)


def refused(result: Result, code: int, *words: str) -> None:
    """The command ended with `code` and one line on stderr that has these words."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("ds-offload: warning")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("no prompt",)),
        (("--prompt", " \n"), ("empty",)),
        (("--prompt", "a", "--prompt-file", "b"), ("once",)),
        (("--prompt-file", "/no/such/file"), ("/no/such/file",)),
        (("--prompt", "a", "--budget", "0"), ("budget 0",)),
        (("--prompt", "a", "--budget", "-5"), ("budget -5",)),
        (("--prompt", "a", "--budget", "1.5"), ("above 1",)),
        (("--prompt", "a", "--budget", "many"), ("'many'",)),
        (("--prompt", "a", "--budget", "300", "--ctx", "200"), ("300", "200")),
        (("--prompt", "a", "--ctx", "0"), ("ctx is 0",)),
        (("--prompt", "a", "--prefetch", "maybe"), ("maybe", "predict")),
        (("--prompt", "a", "--label-bits", "5"), ("label_bits is 5",)),
        (("--prompt", "a", "--label-channels", "4096"), ("label_channels is 4096",)),
        (("--prompt", "a", "--max-new-tokens", "0"), ("--max-new-tokens",)),
        (("--prompt", "a", "--temperature", "-1"), ("--temperature",)),
        (("--prompt", "a", "--top-p", "0"), ("--top-p",)),
        (("--prompt", "a", "--top-k", "0"), ("--top-k",)),
        (("--prompt", "a", "--repetition-penalty", "0"), ("--repetition-penalty",)),
        (("--prompt", "a", "--dtype", "int8"), ("int8", "bfloat16")),
        (("--prompt", "a", "--device", "tpu"), ("tpu",)),
        (("--prompt", "a", "--stats", "loud"), ("loud", "json")),
        (("--prompt", "a", "--stats-file", "/no/such/folder/x.json"), ("/no/such/folder",)),
        (("--prompt", "a", "--calibration", "/no/such/file"), ("--calibration", "/no/such/file")),
        (("--prompt", "a", "--calibration", __file__), ("not a calibration file",)),
        (("--prompt", "a", "--model", "/no/such/model"), ("/no/such/model",)),
        (("--prompt", "a", "--model", __file__), ("is a file",)),
        (("--prompt", "a", "--model", str(ROOT / "tests")), ("no config.json",)),
        (("--prompt", "a", "--model", " "), ("--model is empty",)),
        (("--prompt", "a", "--chat"), ("chat template",)),
        (("--prompt", "a" * 100, "--ctx", "64", "--max-new-tokens", "4"), ("101 tokens", "--ctx 64")),
    ],
)
def test_generate_refuses(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("generate", *arguments), 2, *words)


def test_text_must_be_utf8(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Käse".encode("latin-1"))
    refused(run("generate", "--prompt-file", str(file)), 2, "UTF-8", "byte 1")
    refused(run("generate", "-", stdin=b"\xff\xfe"), 2, "UTF-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu() -> None:
    refused(run("generate", "--prompt", "a", "--device", "cuda"), 1, "GPU", "doctor")


@pytest.mark.parametrize(
    ("config", "reason"),
    [(T5Config(), "encoder-decoder"), (MambaConfig(), "state-space")],
)
def test_unsupported_model(tmp_path: Path, config: Any, reason: str) -> None:
    config.save_pretrained(tmp_path)
    refused(run("generate", "--prompt", "a", "--model", str(tmp_path)), 2, config.model_type, reason)


def test_damaged_weights(tmp_path: Path) -> None:
    embedded = ROOT / "offload_runtime" / "data" / "tiny-256k"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((embedded / name).read_bytes())
    result = run("generate", "--prompt", "a", "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot load model" in result.stderr.splitlines()[-1]
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    result = run("generate", "--prompt", "a", "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "cannot load model" in result.stderr.splitlines()[-1]


def test_too_little_memory_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli_model, "measure", lambda _: FreeMemory(host=900_000_000))
    monkeypatch.setattr(cli_model.OffloadedModel, "from_pretrained", must_not_load)
    arguments = ("--prompt", "a", "--max-new-tokens", "100000", "--device", "cpu")
    refused(run("generate", *arguments), 1, "0.90 GB are free", "--ctx ")


def test_fit_shrinks_before_loading(fake: "FakeModel", monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = ROOT / "offload_runtime" / "data" / "tiny-256k"
    config = load_config(str(embedded))
    tokens = len("<bos>abc") - 4 + 128  # <bos> is one token, the rest are bytes; 128 new ones
    plan = make_plan(RuntimeConfig(), config, FreeMemory(10**12), "cpu", tokens=tokens)
    monkeypatch.setattr(cli_model, "measure", lambda _: FreeMemory(plan.host_bytes - 1))
    refused(run("generate", "--prompt", "abc", "--device", "cpu"), 1, "of host memory")
    settings: dict[str, Any] = {}

    def load(*_: Any, **given: Any) -> FakeModel:
        settings.update(given)
        return fake

    monkeypatch.setattr(cli_model.OffloadedModel, "from_pretrained", load)
    result = run("generate", "--prompt", "abc", "--device", "cpu", "--fit")
    assert result.exit_code == 0, result.stderr
    assert f"slots lowered from {plan.layout.slots} to {settings['slots']}" in result.stderr
    assert settings["slots"] < plan.layout.slots
    assert settings["label_bits"] == 4


class FakeModel:
    """Stands in for OffloadedModel: streams a few tokens, or raises."""

    def __init__(self, tokenizer: Any, error: BaseException | None = None) -> None:
        self.tokenizer, self.error = tokenizer, error
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")  # type: ignore[assignment]
        self.closed = False
        self.arguments: dict[str, Any] = {}

    def generate(self, ids: torch.Tensor, streamer: Any, **arguments: Any) -> None:
        self.arguments = arguments
        streamer.put(ids)
        if self.error is not None:
            raise self.error
        streamer.put(torch.tensor([ord("h")]))
        streamer.put(torch.tensor([ord("i")]))
        streamer.end()

    @property
    def stats(self) -> dict[str, Any]:
        layer = {"selected": 4, "hits": 3, "misses": 1, "bytes": 512, "recall": None}
        return {
            "ttft_s": 0.5,
            "tpot_s": 0.01,
            "prompt_tokens": 3,
            "new_tokens": 2,
            "hit_rate": 0.75,
            "prefetch_recall": None,
            "gather_gb": 0.1,
            "placement": "host",
            "fitted": [],
            "reused_tokens": 0,
            "pinned_gb": 0.2,
            "gpu_prefill_peak_gb": None,
            "gpu_decode_peak_gb": None,
            "layers": [layer],
        }

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    source = ROOT / "offload_runtime" / "data" / "tiny-256k"
    model = FakeModel(AutoTokenizer.from_pretrained(source))
    monkeypatch.setattr(cli_model.OffloadedModel, "from_pretrained", lambda *_, **__: model)
    return model


def test_text_to_stdout_and_the_rest_to_stderr(fake: FakeModel, tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    result = run("generate", "-", "--stats", "json", "--stats-file", str(file), stdin="abc")
    assert (result.exit_code, result.stdout) == (0, "hi\n")
    figures = json.loads(result.stderr.splitlines()[-1])
    assert figures == json.loads(file.read_text())
    assert figures["hit_rate"] == 0.75
    assert figures["planned_pinned_gb"] > 0
    assert fake.closed
    assert fake.arguments["do_sample"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["stats.json"]


def test_summary_and_table(fake: FakeModel) -> None:
    result = run("generate", "--prompt", "abc", "--stats", "table", "--top-k", "5")
    assert "hit rate 75.0 %" in result.stderr
    assert "rows by layer" in result.stderr
    assert fake.arguments["do_sample"] is True
    assert fake.arguments["top_k"] == 5


def test_interrupt(fake: FakeModel) -> None:
    fake.error = KeyboardInterrupt()
    result = run("generate", "--prompt", "abc")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert fake.closed


def test_gpu_out_of_memory_is_one_line(fake: FakeModel) -> None:
    fake.error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmany lines")
    result = run("generate", "--prompt", "abc")
    assert result.exit_code == 1
    assert "lower --ctx" in result.stderr.splitlines()[-1]
    assert fake.closed


def test_beyond_trained_positions_warns(fake: FakeModel, tmp_path: Path) -> None:
    embedded = ROOT / "offload_runtime" / "data" / "tiny-256k"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((embedded / name).read_bytes())
    config = json.loads((embedded / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    result = run("generate", "--prompt", "abcdefghijkl", "--model", str(tmp_path))
    assert result.exit_code == 0
    assert "--rope-scaling" in result.stderr
    assert "8 positions" in result.stderr


def test_generate_agrees_with_transformers() -> None:
    """The real engine, full budget, greedy: the text is what transformers alone writes."""
    prompt = (
        "The pass key for silly-walrus is 48213. It was a dark night.\n\nThe pass key for silly-walrus is"
    )
    result = run(
        "generate", "--prompt", prompt, "--max-new-tokens", "8", "--budget", "1.0", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    source = ROOT / "offload_runtime" / "data" / "tiny-256k"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert result.stdout == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    assert "48213" in result.stdout


def test_reader_that_goes_away() -> None:
    """`ds-offload doctor | head` must not end in a traceback."""
    command = [sys.executable, "-c", "from offload_runtime.cli import main; main()", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141, error
    assert error == ""


def test_help_shows_the_defaults() -> None:
    """The defaults of RuntimeConfig stand in the options' texts, where the option itself has none."""
    shown, defaults = run("generate", "--help").stdout, RuntimeConfig()
    for name in ("ctx", "budget", "prefetch", "label_bits", "sinks", "recent", "placement", "new_rows"):
        option = "--" + name.replace("_", "-")
        text = shown.split(option + " ", 1)[1].split(" --", 1)[0]
        assert f"({getattr(defaults, name)}" in text, option


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from offload_runtime.cli import app; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_doctor_without_failures() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["torch"]["value"] == torch.__version__ or findings["torch"]["ok"]
    if not torch.cuda.is_available():
        assert not findings["GPU"]["ok"]
        assert findings["GPU"]["fix"]


def test_plan_json_and_table(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    arguments = ("--model", str(tmp_path), "--ctx", "4096", "--gpu-gb", "80", "--host-gb", "64")
    plan = json.loads(run("plan", *arguments, "--json").stdout)
    assert plan["fits"]
    assert plan["budget"] == 256
    assert plan["predicted_s"]["ttft"] > 0
    table = run("plan", *arguments)
    assert "largest ctx" in table.stdout
    assert "beyond the 2048 positions" in table.stderr


def test_plan_says_what_few_new_rows_would_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight documents of an 8B model, whose rows wait for the link where selection is exact."""
    # Where there is a GPU, every plan measures its link anew.
    monkeypatch.setattr("offload_runtime.cli_plan.rates_here", lambda device: Rates())
    sizes = {"num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    arguments = ("--model", str(tmp_path), "--ctx", "131072", "--places", "8", "--budget", "2048")
    device = ("--device", "cuda", "--gpu-gb", "80", "--host-gb", "200")
    plan = json.loads(run("plan", *arguments, *device, "--json").stdout)
    assert plan["predicted_tpot_s_new_rows_1_8"] < 0.7 * plan["predicted_s"]["offload_tpot"]
    assert "--new-rows 1/8" in run("plan", *arguments, *device).stdout
    sticky = json.loads(run("plan", *arguments, *device, "--new-rows", "1/8", "--json").stdout)
    assert sticky["predicted_tpot_s_new_rows_1_8"] is None
    assert sticky["predicted_s"]["offload_tpot"] == plan["predicted_tpot_s_new_rows_1_8"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/no/such/file",), ("/no/such/file",)),
        ((__file__, "--channels", "0"), ("--channels",)),
        ((__file__, "--channels", "129"), ("head_dim is 128",)),
        ((__file__, "--out", "/no/such/folder/c.safetensors"), ("/no/such/folder",)),
        ((__file__, "--method", "magic"), ("magic",)),
    ],
)
def test_calibrate_refuses(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(run("calibrate", *arguments, "--device", "cpu"), 2, *words)


def test_calibrate_then_generate(tmp_path: Path, fake: FakeModel) -> None:
    """A written file is accepted for its model and refused, before any weights load, for another."""
    file, other = tmp_path / "c.safetensors", tmp_path / "other"
    text = str(ROOT / "offload_runtime" / "data" / "prose.txt")
    result = run("calibrate", text, "--tokens", "256", "--channels", "16", "--out", str(file))
    assert result.exit_code == 0, result.stderr
    assert run("generate", "--prompt", "a", "--calibration", str(file)).exit_code == 0
    LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=2).save_pretrained(other)
    wrong = run("generate", "--prompt", "a", "--model", str(other), "--calibration", str(file))
    refused(wrong, 2, "calibration")
