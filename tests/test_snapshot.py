"""Saved caches: the same tokens as without one, and no half-written, damaged or foreign one is taken."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from offload_runtime import snapshot
from offload_runtime.errors import RunError, UserError

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama

NEW_TOKENS, LENGTH = 3, 120
SETTINGS = {"budget": 24, "prefetch": "correct"}


def ask(runtime, ids, resume=True):
    return logits_of(runtime.generate, ids, NEW_TOKENS, resume=resume)


def saved(tmp_path: Path, model, length: int = LENGTH, **settings) -> tuple[Path, torch.Tensor]:
    """A snapshot of a document of that many tokens."""
    document = random_ids(length, device=model.device)
    runtime = offloaded(model, **{**SETTINGS, **settings})
    runtime.generate(document, max_new_tokens=1, do_sample=False)
    runtime.save_cache(tmp_path / "doc")
    return tmp_path / "doc", document


def question(document: torch.Tensor, seed: int, length: int = 7) -> torch.Tensor:
    return torch.cat([document, random_ids(length, seed=seed, device=document.device)], 1)


@pytest.fixture
def model(device):
    return random_llama(layers=2, device=device)


@pytest.mark.parametrize("label_bits", [4, 16])
def test_questions_of_a_loaded_document(tmp_path, model, label_bits):
    folder, document = saved(tmp_path, model, label_bits=label_bits)
    in_process = offloaded(model, label_bits=label_bits, **SETTINGS)
    in_process.generate(document, max_new_tokens=1, do_sample=False)
    loaded = offloaded(model, label_bits=label_bits, **SETTINGS)
    assert loaded.load_cache(folder) == LENGTH
    for seed in (1, 2):  # the second question shares the document with the first
        expected_ids, expected = ask(in_process, question(document, seed))
        got_ids, got = ask(loaded, question(document, seed))
        assert torch.equal(got_ids, expected_ids)
        assert torch.equal(got, expected)
        assert loaded.stats["reused_tokens"] == LENGTH


def test_same_tokens_as_a_full_prefill(tmp_path, model):
    """With every token attended to, labels do not matter: a plain run must say the same."""
    folder, document = saved(tmp_path, model, budget="1/1")
    ids = question(document, 3)
    expected_ids, expected = ask(offloaded(model, budget="1/1"), ids, resume=False)
    loaded = offloaded(model, budget="1/1")
    loaded.load_cache(folder)
    got_ids, got = ask(loaded, ids)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_other_budget_slots_sinks_and_room(tmp_path, model):
    """What a snapshot does not depend on: it holds the tokens' own rows and labels only."""
    folder, document = saved(tmp_path, model, length=1010)
    settings = {"budget": "1/1", "slots": 2000, "sinks": 7, "recent": 5}
    loaded = offloaded(model, **settings)
    loaded.load_cache(folder, new_tokens=2000)
    ids = question(document, 4)
    assert torch.equal(ask(loaded, ids)[0], ask(offloaded(model, **settings), ids, resume=False)[0])
    assert loaded.stats["reused_tokens"] == 1010


def test_batch(tmp_path, model):
    documents = random_ids(80, batch=2, device=model.device)
    first = offloaded(model, budget="1/1")
    first.generate(documents, max_new_tokens=1, do_sample=False)
    first.save_cache(tmp_path / "doc")
    loaded = offloaded(model, budget="1/1")
    assert loaded.load_cache(tmp_path / "doc") == 160
    ids = torch.cat([documents, random_ids(5, batch=2, seed=9, device=model.device)], 1)
    assert torch.equal(ask(loaded, ids)[0], ask(first, ids)[0])
    assert loaded.stats["reused_tokens"] == 160


@pytest.mark.parametrize("length", [20, 100])  # shorter and longer than the window
def test_sliding_layers(tmp_path, device, length):
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=32, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"], eos_token_id=None,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().to(device)
    folder, document = saved(tmp_path, model, length=length, budget="1/1")
    ids = question(document, 5)
    loaded = offloaded(model, budget="1/1")
    loaded.load_cache(folder)
    got = ask(loaded, ids)[0]
    assert loaded.stats["reused_tokens"] == length
    assert torch.equal(got, ask(offloaded(model, budget="1/1"), ids, resume=False)[0])


def test_every_tampered_file_is_refused(tmp_path, model):
    folder, _ = saved(tmp_path, model)
    files = sorted(folder.iterdir())
    assert len(files) == 2 + model.config.num_hidden_layers
    for file in files:
        before = file.read_bytes()
        for damage in (
            flip(before, len(before) // 2),
            flip(before, len(before) - 1),
            before[:-1],
            before + b"x",
            b"",
        ):
            file.write_bytes(damage)
            with pytest.raises(UserError, match="damaged") as refusal:
                offloaded(model, **SETTINGS).load_cache(folder)
            assert "\n" not in str(refusal.value)
        file.unlink()
        with pytest.raises(UserError, match=r"missing|no saved cache"):
            offloaded(model, **SETTINGS).load_cache(folder)
        file.write_bytes(before)
    restored = offloaded(model, **SETTINGS)
    assert restored.load_cache(folder) == LENGTH


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_a_refused_snapshot_leaves_the_model_usable(tmp_path, model):
    folder, document = saved(tmp_path, model)
    layer = folder / "layer-001.bin"
    layer.write_bytes(flip(layer.read_bytes(), 100))
    runtime = offloaded(model, **SETTINGS)
    with pytest.raises(UserError):
        runtime.load_cache(folder)
    ids = question(document, 6)
    assert torch.equal(ask(runtime, ids)[0], ask(offloaded(model, **SETTINGS), ids)[0])
    assert runtime.stats["reused_tokens"] == 0


def test_foreign_snapshots_are_refused(tmp_path, model):
    folder, _ = saved(tmp_path, model)
    with pytest.raises(UserError, match="num_hidden_layers 2 there, 1 here"):
        offloaded(random_llama(layers=1, device=model.device)).load_cache(folder)
    with pytest.raises(UserError, match="label_bits 4 there, 8 here"):
        offloaded(model, label_bits=8).load_cache(folder)
    with pytest.raises(UserError, match=r"torch.float32 there, torch.bfloat16 here"):
        offloaded(random_llama(layers=2, dtype=torch.bfloat16, device=model.device)).load_cache(folder)
    with pytest.raises(UserError, match="ctx is 100"):
        offloaded(model, ctx=100).load_cache(folder)
    tuned = random_llama(layers=2, device=model.device)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    with pytest.raises(UserError, match="other weights"):
        offloaded(tuned).load_cache(folder)
    with pytest.raises(UserError, match="no saved cache"):
        offloaded(model).load_cache(tmp_path)


def test_another_calibration_is_refused(tmp_path, model):

    calibration = identity_calibration(model)
    folder, _ = saved(tmp_path, model, label_channels=16)
    runtime = offloaded(model, **SETTINGS)
    runtime.calibration = calibration
    with pytest.raises(UserError, match="another calibration"):
        runtime.load_cache(folder)


def test_targets_that_cannot_be(tmp_path, model):
    with pytest.raises(UserError, match="nothing to save"):
        offloaded(model).save_cache(tmp_path / "doc")
    (tmp_path / "file").write_text("x")
    for target, reason in (
        (tmp_path, "other files"),
        (tmp_path / "file", "a file"),
        (tmp_path / "no/doc", "no folder"),
    ):
        with pytest.raises(UserError, match=reason):
            saved_to(target, model)


def saved_to(target: Path, model) -> None:
    runtime = offloaded(model, **SETTINGS)
    runtime.generate(random_ids(50, device=model.device), max_new_tokens=1, do_sample=False)
    runtime.save_cache(target)


def test_disk_full(tmp_path, model, monkeypatch):
    """A file size limit ends the writing half-way, as a full disk would (EFBIG for ENOSPC)."""
    saved_to(tmp_path / "doc", model)
    before = {file.name: file.read_bytes() for file in (tmp_path / "doc").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match="cannot save the cache") as refusal:
            saved_to(tmp_path / "doc", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "doc").iterdir()} == before
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"0\.00 GB are free"):
        saved_to(tmp_path / "doc", model)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(tiny_disk, model, monkeypatch):
    plenty = shutil.disk_usage(tiny_disk)._replace(free=1 << 40)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: plenty)  # it filled up after the check
    with pytest.raises(RunError, match="No space left"):
        saved_to(tiny_disk / "doc", model)
    assert list(tiny_disk.iterdir()) == []


SLOW_SAVE = """
import sys, time
from pathlib import Path
from offload_runtime import snapshot
from tests.models import random_llama
from tests.test_snapshot import saved_to
write = snapshot.write_tensors
def slow_write(path, tensors):
    record = write(path, tensors)
    if path.name == "layer-001.bin":
        print("writing", flush=True)
        time.sleep(60)
    return record
snapshot.write_tensors = slow_write
saved_to(Path(sys.argv[1]), random_llama(layers=2))
"""


@pytest.mark.parametrize("older", [False, True])
def test_killed_while_writing(tmp_path, older):
    """Nothing of the killed write is taken for a snapshot, the older one stays, the next save cleans up."""
    model, target = random_llama(layers=2), tmp_path / "doc"
    if older:
        saved_to(target, model)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, str(target)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    saved_to(tmp_path / "other", model)  # another save nearby leaves the one at work alone
    part = next(tmp_path.glob(".doc.*.partial"))
    child.kill()
    child.wait()
    assert part.is_dir()
    runtime = offloaded(model, **SETTINGS)
    if older:
        assert runtime.load_cache(target) == 50
    else:
        with pytest.raises(UserError, match="no saved cache"):
            runtime.load_cache(target)
    saved_to(target, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc", "other"]
    assert runtime.load_cache(target) == 50


def test_a_write_at_work_is_not_a_leftover(tmp_path):
    from offload_runtime.snapshot_files import atomic_directory, remove_leftovers

    with atomic_directory(tmp_path / "doc") as part:
        remove_leftovers(tmp_path / "doc")
        assert part.is_dir()


def test_killed_between_the_two_renames(tmp_path, model):
    saved_to(tmp_path / "doc", model)
    (tmp_path / "doc").rename(tmp_path / ".doc.replaced")
    assert offloaded(model, **SETTINGS).load_cache(tmp_path / "doc") == 50
    saved_to(tmp_path / "doc", model)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]


def test_the_header_says_what_is_there(tmp_path, model):
    folder, _ = saved(tmp_path, model)
    header = json.loads((folder / "snapshot.json").read_text())
    row_bytes = 2 * 64 * 4  # K and V, head_dim 64, float32
    assert header["files"]["layer-000.bin"]["bytes"] > 2 * LENGTH * row_bytes  # 2 KV heads
    assert header["lengths"] == [LENGTH]
    assert time.time() - (folder / "snapshot.json").stat().st_mtime < 600


def run_cli(*arguments: str):
    from typer.testing import CliRunner

    from offload_runtime.cli import app

    return CliRunner().invoke(app, ["generate", "--device", "cpu", *arguments])


def test_command_line(tmp_path):
    """Save with one prompt, ask with a longer one: the same text, and only the question is prefilled."""
    text = "The pass key for silly-walrus is 48213. It was a dark night.\n\n"
    asked, cache = text + "The pass key for silly-walrus is", str(tmp_path / "doc")
    first = run_cli("--prompt", text, "--max-new-tokens", "1", "--budget", "1.0", "--save-cache", cache)
    assert first.exit_code == 0, first.stderr
    question = ("--prompt", asked, "--max-new-tokens", "6", "--budget", "1.0", "--stats", "json")
    plain, loaded = run_cli(*question), run_cli(*question, "--load-cache", cache)
    assert loaded.exit_code == 0, loaded.stderr
    assert loaded.stdout == plain.stdout
    assert "48213" in loaded.stdout
    figures = json.loads(loaded.stderr.splitlines()[-1])
    assert figures["reused_tokens"] == len(text.encode()) + 1  # bytes, and <bos>
    assert "warning" not in loaded.stderr
    other = run_cli("--prompt", "x", "--max-new-tokens", "1", "--load-cache", cache)
    assert f"warning: only 1 of the {figures['reused_tokens']} tokens" in other.stderr


def test_command_line_refuses_before_loading(tmp_path, monkeypatch):
    from offload_runtime import cli_generate

    monkeypatch.setattr(cli_generate, "load", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    for arguments, word in (
        (("--load-cache", str(tmp_path / "absent")), "no saved cache"),
        (("--save-cache", str(tmp_path / "full")), "other files"),
        (("--placement", "moon"), "placement is 'moon'"),
    ):
        result = run_cli("--prompt", "a", *arguments)
        assert result.exit_code == 2
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
