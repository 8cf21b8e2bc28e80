"""A quality target chooses the cheapest setting that reaches it, and the choice is used afterwards."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from offload_runtime import OffloadedModel
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_file import with_choice
from offload_runtime.cli import app
from offload_runtime.errors import RunError
from offload_runtime.evals.grid import Setting
from offload_runtime.evals.quality import choose

pytest.importorskip("matplotlib")
EMBEDDED = Path(__file__).resolve().parent.parent / "offload_runtime" / "data" / "tiny-256k"


def line(budget, bits, ctx, attended):
    return {
        "budget": budget,
        "channels": 32,
        "bits": bits,
        "prefetch": "off",
        "new_rows": "auto",
        "ctx": ctx,
        "attended": attended,
    }


LINES = [
    line("1/16", 4, 1000, 0.97),
    line("1/16", 8, 1000, 0.992),
    line("1/8", 4, 1000, 0.995),
    line("1/4", 4, 1000, 0.999),
    line("1/16", 4, 9000, 0.99),
    line("1/16", 8, 9000, 0.98),
    line("1/8", 4, 9000, 0.991),
    line("1/4", 4, 9000, 0.999),
]


def test_the_cheapest_that_reaches_it_at_every_length():
    assert choose(LINES, 0.99) == (Setting("1/8", 32, 4, "off"), 0.991)
    assert choose(LINES, 0.97) == (Setting("1/16", 32, 4, "off"), 0.97)  # 4 bits before 8
    with pytest.raises(RunError, match=r"no setting attends to 0.9999.*0.9990"):
        choose(LINES, 0.9999)


def test_command_and_use(tmp_path):
    arguments = ["--ctx", "600", "--tokens", "4", "--budget", "8,1/4", "--quality", "0.98", "--device", "cpu"]
    result = CliRunner().invoke(app, ["eval", "attention", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1/4" in result.stdout
    file = tmp_path / "calibration-tiny-256k-quality.safetensors"
    facts = Calibration.load(file).provenance
    assert (facts["budget"], facts["label_bits"]) == ("1/4", "4")
    assert float(facts["quality_measured"]) >= 0.98
    settings = {"calibration": str(file)}
    model = OffloadedModel.from_pretrained(EMBEDDED, device="cpu", **settings)
    assert model.config.budget == "1/4"
    assert with_choice({**settings, "budget": "64"}, EMBEDDED)["budget"] == "64"  # what the user gives wins
    assert with_choice({}, EMBEDDED) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["bits", "--quality", "0.9"], "attention"), (["attention", "--quality", "1.5"], "1.5")],
)
def test_bad_targets_are_one_line(tmp_path, arguments, words):
    result = CliRunner().invoke(app, ["eval", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
