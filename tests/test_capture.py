"""Decode in a CUDA graph: which families are captured, and what happens where a step cannot be."""

import gc
from contextlib import suppress

import pytest
import torch

from offload_runtime import decode
from offload_runtime.architectures import GROUPED_ON_GPU, capturable_experts
from offload_runtime.capture import nothing_freed_by_chance

from .architectures import random_model
from .models import logits_of, offloaded, random_ids, random_llama

PROMPT = 90


def waiting(model) -> None:
    """Let a layer ask for a number in GPU memory, as some models' routing does."""
    mlp = model.model.layers[1].mlp
    plain = mlp.forward

    def forward(hidden):
        assert bool(torch.isfinite(hidden.sum()))
        return plain(hidden)

    mlp.forward = forward


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt-oss"])
def test_mixtures_in_bfloat16_decode_inside_a_graph(name, recwarn):
    """test_architectures says so of every family in float32, where experts run another way."""
    model, ids = random_model(name, "cuda").bfloat16(), random_ids(PROMPT, device="cuda")
    runtime = offloaded(model, budget=12, slots=16)
    _, captured = logits_of(runtime.generate, ids, 6)
    assert runtime.stats["cuda_graph"], [str(warning.message) for warning in recwarn]
    plain = offloaded(model, budget=12, slots=16, cuda_graph=False)
    _, step_by_step = logits_of(plain.generate, ids, 6)
    assert not plain.stats["cuda_graph"]
    assert torch.equal(captured, step_by_step)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral, sliding", "qwen2, sliding"])
def test_fast_prefill_of_a_bfloat16_model(name):
    """Windows and softcap by the kernels of 16-bit models: about as near to float32 as transformers is."""
    exact, ids = random_model(name, "cuda"), random_ids(PROMPT, device="cuda")
    model = random_model(name, "cuda").bfloat16()
    _, truth = logits_of(exact.generate, ids, 1)
    _, theirs = logits_of(model.generate, ids, 1)
    _, ours = logits_of(offloaded(model, budget="1/1").generate, ids, 1)
    assert (ours - truth).abs().mean() <= 3 * (theirs - truth).abs().mean()


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_runs_without_a_graph():
    model, ids = random_llama(device="cuda"), random_ids(PROMPT, device="cuda")
    _, expected = logits_of(offloaded(model, budget=12).generate, ids, 8)
    waiting(model)
    runtime = offloaded(model, budget=12)
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph"):
        _, got = logits_of(runtime.generate, ids, 8)
    assert torch.equal(got, expected)
    assert not runtime.stats["cuda_graph"]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.multinomial(torch.ones(4, device="cuda"), 2)  # the generator is usable again
    runtime.generate(ids, max_new_tokens=4, do_sample=True)
    del model.model.layers[1].mlp.forward
    again = offloaded(model, budget=12)
    _, captured = logits_of(again.generate, ids, 8)
    assert again.stats["cuda_graph"]
    assert torch.equal(captured, expected)


def test_a_failed_capture_loses_no_token(monkeypatch):
    """The same on a CPU, with a capture that fails at once."""
    model, ids = random_llama(), random_ids(PROMPT)
    _, expected = logits_of(offloaded(model, budget=12).generate, ids, 8)

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(decode, "capture", fails)
    plain = decode.DecodeLoop.__init__

    def with_graph(self, *arguments):
        plain(self, *arguments)
        self.use_graph = True

    monkeypatch.setattr(decode.DecodeLoop, "__init__", with_graph)
    runtime = offloaded(model, budget=12)
    with pytest.warns(UserWarning, match=r"of LlamaForCausalLM cannot .*\(operation .* capturing\); steps"):
        _, got = logits_of(runtime.generate, ids, 8)
    assert torch.equal(got, expected)
    assert runtime.stats["cuda_graph"] is False


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_grouped_experts_only_where_they_stay_on_the_gpu(monkeypatch, capability):
    model = random_model("mixtral").bfloat16()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with capturable_experts(model):
        chosen = model.config._experts_implementation
    assert chosen == ("grouped_mm" if capability[0] in GROUPED_ON_GPU else "batched_mm")


def test_a_loop_over_experts_gives_way_to_their_batched_product():
    model, ids = random_model("qwen3 moe"), random_ids(1, batch=3)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with capturable_experts(model):
            assert model.config._experts_implementation == "batched_mm"
            step = model(ids, use_cache=False).logits
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(step, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("searching", [True, False])
def test_the_garbage_collector_waits_for_a_capture_to_end(searching):
    was = gc.isenabled()
    (gc.enable if searching else gc.disable)()
    try:
        with suppress(RuntimeError), nothing_freed_by_chance():
            assert not gc.isenabled()
            raise RuntimeError("a capture that fails")
        assert gc.isenabled() == searching
    finally:
        (gc.enable if was else gc.disable)()
