"""The audit against attention by hand, and that watching changes nothing."""

import pytest
import torch
from typer.testing import CliRunner

from offload_runtime.audit import dense_attention
from offload_runtime.cli import app

from .models import logits_of, offloaded, random_ids, random_llama


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("with_sink", [False, True])
def test_dense_attention_by_hand(monkeypatch, softcap, with_sink):
    monkeypatch.setattr("offload_runtime.audit.ROW_BLOCK", 7)  # several blocks, the last one short
    torch.manual_seed(0)
    query, rows = torch.randn(4, 8), torch.randn(2, 23, 16)
    sink = torch.randn(4) if with_sink else None
    out, logits, lse = dense_attention(query, rows, 0.7, softcap, sink)
    for head in range(4):
        keys, values = rows[head // 2, :, :8], rows[head // 2, :, 8:]
        expected = keys @ query[head] * 0.7
        if softcap:
            expected = softcap * torch.tanh(expected / softcap)
        everything = torch.cat([expected, sink[head : head + 1]]) if with_sink else expected
        torch.testing.assert_close(logits[head], expected)
        torch.testing.assert_close(lse[head], everything.logsumexp(0))
        torch.testing.assert_close(out[head], everything.softmax(0)[:23] @ values)


def test_full_budget_misses_nothing(device):
    runtime = offloaded(random_llama(device=device), budget="1/1", audit_every=2)
    runtime.generate(random_ids(300, device=device), max_new_tokens=8, do_sample=False)
    audit = runtime.stats["audit"]
    assert audit["steps"] == 3  # of seven decode steps
    assert audit["seconds"] > 0
    for layer in audit["layers"]:
        assert layer["missed_mass_max"] == 0
        assert layer["relative_error_max"] < 1e-5


@pytest.mark.parametrize("prefetch", ["correct", "predict"])
def test_audit_sees_what_a_small_budget_costs_and_changes_nothing(device, prefetch):
    model, ids = random_llama(device=device), random_ids(300, device=device)
    settings = {"budget": 8, "prefetch": prefetch}
    _, plain = logits_of(offloaded(model, **settings).generate, ids, 10)
    watched = offloaded(model, audit_every=3, **settings)
    _, audited = logits_of(watched.generate, ids, 10)
    assert torch.equal(plain, audited)
    audit = watched.stats["audit"]
    assert audit["steps"] == 3
    for layer in audit["layers"]:
        assert 0.01 < layer["missed_mass"] <= layer["missed_mass_max"] < 1
        assert 0.001 < layer["relative_error"] <= layer["relative_error_max"]


def test_missed_mass_is_the_selections_complement(device):
    """Twice the budget misses less; a budget short of all tokens by a few misses next to nothing."""
    model, ids = random_llama(device=device), random_ids(300, device=device)
    missed = []
    for budget in (16, 64, 270):
        runtime = offloaded(model, budget=budget, audit_every=1)
        runtime.generate(ids, max_new_tokens=3, do_sample=False)
        missed.append(runtime.stats["audit"]["missed_mass"])
    assert missed[0] > missed[1] > missed[2]
    assert missed[2] < 0.02


def test_off_by_default(device):
    runtime = offloaded(random_llama(device=device), budget=8)
    runtime.generate(random_ids(50, device=device), max_new_tokens=3, do_sample=False)
    assert "audit" not in runtime.stats


def test_batch_and_each_call_alone(device):
    runtime = offloaded(random_llama(device=device), budget="1/1", audit_every=1)
    for _ in range(2):
        runtime.generate(random_ids(60, batch=2, device=device), max_new_tokens=4, do_sample=False)
        assert runtime.stats["audit"]["steps"] == 3
        assert runtime.stats["audit"]["missed_mass"] == 0


def test_command_prints_its_cost():
    arguments = ["generate", "--prompt", "word " * 120, "--max-new-tokens", "5", "--ctx", "1024"]
    result = CliRunner().invoke(app, [*arguments, "--budget", "32", "--audit", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "audit of 2 steps" in result.stderr
    assert "ms an audited step" in result.stderr
    wrong = CliRunner().invoke(app, [*arguments, "--audit", "0", "--device", "cpu"])
    assert wrong.exit_code == 2
    assert "audit_every is 0" in wrong.stderr
