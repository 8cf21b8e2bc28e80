"""Saved caches: the same tokens as without one, and no half-written, damaged or foreign one is taken."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from offload_runtime.errors import UserError

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
    assert len(files) == 3 + model.config.num_hidden_layers
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
    folder, _ = saved(tmp_path, model, label_channels=16)
    runtime = offloaded(model, **SETTINGS)
    runtime.calibration = identity_calibration(model)
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
