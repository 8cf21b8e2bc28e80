"""A killed calibration goes on where it was, and what it gives is what an uninterrupted one gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload_runtime.calibrate_command import calibrate
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_collect import Collection

from .tiny_model import save_tiny_llama, tiny_llama

ROOT = Path(__file__).resolve().parent.parent
# Writes a dot a finished layer, so that the parent knows when to kill it; slow enough to be caught.
CHILD = """
import sys, time
from offload_runtime import calibrate_command
calibrate_command.BLOCK_TOKENS = 300
def report(done, total):
    print(done, flush=True)
    time.sleep(0.05)
model, text, out = sys.argv[1:]
calibrate_command.calibrate(model, [text], channels=8, out=out, tokens=1200, device="cpu", progress=report)
"""
LAYERS, BLOCKS = 3, 4
GUESSING = LAYERS * BLOCKS  # all blocks once more, not resumed


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("offload_runtime.calibrate_command.BLOCK_TOKENS", 300)


@pytest.fixture
def model(tmp_path):
    return save_tiny_llama(tmp_path / "model")


def write_text(folder):
    file = folder / "text.txt"
    file.write_text("".join(f"The whale number {n}, said Ahab, is no fish for you. " for n in range(60)))
    return file


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def run(model, text, out, **options):
    """calibrate() with the progress it reported."""
    seen = []
    arguments = {"channels": 8, "out": out, "tokens": 1200, "device": "cpu", **options}
    calibrate(model, [text], progress=lambda done, total: seen.append(done), **arguments)
    return seen


def killed(model, text, out, layers):
    """Start calibrating in a process of its own and kill it when that many layers are done."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(model), str(text), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
        for line in child.stdout:
            if int(line) >= layers:
                child.kill()
                break
    assert child.returncode == -9
    assert not out.exists()


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """Where a calibration was killed after its first block: once, since a new process takes seconds."""
    folder = tmp_path_factory.mktemp("killed")
    killed(save_tiny_llama(folder / "model"), write_text(folder), folder / "out.safetensors", LAYERS + 1)
    return folder


@pytest.fixture
def out(killed_once, tmp_path):
    """The output of a calibration of `model` on `text` that was killed after its first block."""
    (side,) = killed_once.glob(".out.safetensors*")
    shutil.copy(side, tmp_path)
    return tmp_path / "out.safetensors"


def side_files(out):
    return sorted(path.name for path in out.parent.glob(f".{out.name}*"))


def tensors_of(calibration):
    """All there are; zeros for what a calibration does not have."""
    found = [getattr(calibration, name) for name in ("query_map", "key_map", "key_mean")]
    guesses, shift = calibration.guesses, calibration.input_shift
    parts = [shift] if guesses is None else [shift, guesses.offset, guesses.down, guesses.up]
    return [
        *found,
        calibration.mass_curve.held,
        *(torch.zeros(1) if part is None else part for part in parts),
    ]


def same(one, other):
    a, b = Calibration.load(one), Calibration.load(other)
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and a.unpredicted_layers == b.unpredicted_layers


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(model, text, tmp_path, caplog):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    assert len(run(model, text, whole)) == LAYERS * BLOCKS + GUESSING
    killed(model, text, out, 2 * LAYERS + 1)  # two blocks are on disk, the third is begun
    seen = run(model, text, out)
    assert "going on after 2 blocks" in caplog.text
    assert seen[0] == 2 * LAYERS + 1
    assert len(seen) == 2 * LAYERS + GUESSING
    assert same(whole, out)
    assert not side_files(out)


def test_killed_before_the_first_block_starts_anew(model, text, tmp_path):
    out = tmp_path / "out.safetensors"
    killed(model, text, out, 1)
    assert not side_files(out)
    assert len(run(model, text, out)) == LAYERS * BLOCKS + GUESSING


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 900}, "text", "weights"])
def test_other_settings_start_anew(model, text, out, tmp_path, caplog, change):
    fresh = tmp_path / "fresh.safetensors"
    options = change if isinstance(change, dict) else {}
    if change == "text":
        text.write_text(text.read_text().replace("Ahab", "Starbuck"))
    if change == "weights":
        changed = tiny_llama()
        changed.model.layers[0].self_attn.q_proj.weight.data += 0.01
        changed.save_pretrained(model)
    run(model, text, out, **options)
    messages = [record.message for record in caplog.records if "starting anew" in record.message]
    assert len(messages) == 1
    run(model, text, fresh, **options)
    assert same(out, fresh)
    assert not side_files(out)


def test_another_method_uses_the_same_sums(model, text, out, tmp_path):
    fresh = tmp_path / "fresh.safetensors"
    assert len(run(model, text, out, method="greedy", channels=4)) == LAYERS * (BLOCKS - 1) + GUESSING
    run(model, text, fresh, method="greedy", channels=4)
    assert same(out, fresh)


def test_a_damaged_side_file_is_not_used(model, text, out, tmp_path, caplog):
    fresh = tmp_path / "fresh.safetensors"
    (side,) = out.parent.glob(f".{out.name}*")
    content = bytearray(side.read_bytes())
    content[-100] ^= 1
    side.write_bytes(content)
    assert len(run(model, text, out)) == LAYERS * BLOCKS + GUESSING
    assert "damaged" in caplog.text
    side.write_bytes(content[:200])
    assert len(run(model, text, out)) == LAYERS * BLOCKS + GUESSING
    assert "cannot be read" in caplog.text
    run(model, text, fresh)
    assert same(out, fresh)


def test_a_kill_while_writing_leaves_the_last_whole_file(model, text, out):
    """The write is cut off before the file takes its place: what was there before is still whole."""
    torn = out.with_name(f".{out.name}.progress.1")
    torn.write_bytes(b"half a file")
    assert len(run(model, text, out)) == LAYERS * (BLOCKS - 1) + GUESSING
    assert not side_files(out)


def test_collection_starts_empty():
    empty = Collection([None, None], [[], []], [None, None], shifted_recalls=[[], []])
    assert Collection.of(2) == empty
