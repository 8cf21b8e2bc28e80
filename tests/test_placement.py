"""Where rows are kept changes nothing but time; they are allocated while prefill runs."""

import threading

import pytest
import torch

from offload_runtime.cache.row_memory import RowMemory
from offload_runtime.config import RuntimeConfig
from offload_runtime.errors import UserError
from offload_runtime.prefetch.scheduler import Prefetcher

from .models import logits_of, offloaded, random_ids, random_llama

NEW_TOKENS = 5


def test_unknown_placement_is_refused():
    with pytest.raises(UserError, match="placement is 'disk'; choose one of host, gpu, auto"):
        RuntimeConfig(placement="disk")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU")
@pytest.mark.parametrize("placement", ["gpu", "auto"])
def test_means_nothing_on_a_cpu(placement):
    model, ids = random_llama(layers=2), random_ids(90)
    runtime = offloaded(model, budget=24, placement=placement)
    expected = logits_of(offloaded(model, budget=24).generate, ids, NEW_TOKENS)
    got = logits_of(runtime.generate, ids, NEW_TOKENS)
    assert torch.equal(got[1], expected[1])
    assert runtime.stats["placement"] == "host"
    assert runtime.stats["pinned_gb"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", ["correct", "predict", "off"])
@pytest.mark.parametrize("length", [21, 300])
def test_rows_on_the_gpu_give_the_same_bits(prefetch, length):
    model, ids = random_llama(device="cuda"), random_ids(length, device="cuda")
    settings = {"budget": 24, "slots": 40, "prefetch": prefetch}
    host, gpu = (offloaded(model, placement=place, **settings) for place in ("host", "gpu"))
    ids_host, on_host = logits_of(host.generate, ids, 12)
    ids_gpu, on_gpu = logits_of(gpu.generate, ids, 12)
    assert torch.equal(ids_host, ids_gpu)
    assert torch.equal(on_host, on_gpu)
    assert gpu._session.caches[0].host.rows.is_cuda
    assert (gpu.stats["placement"], gpu.stats["pinned_gb"]) == ("gpu", 0)
    assert (host.stats["placement"], host.stats["gpu_cache_gb"] < gpu.stats["gpu_cache_gb"]) == ("host", True)


@pytest.mark.gpu
def test_auto_keeps_a_small_cache_on_the_gpu_and_resumes():
    model, ids = random_llama(device="cuda"), random_ids(1000, device="cuda")
    auto = offloaded(model, budget="1/1", placement="auto")
    turn = auto.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert auto.stats["placement"] == "gpu"
    longer = torch.cat([turn, random_ids(100, seed=3, device="cuda")], 1)  # needs larger caches
    got = auto.generate(longer, max_new_tokens=NEW_TOKENS, do_sample=False, resume=True)
    assert auto.stats["reused_tokens"] > 1000
    expected = offloaded(model, budget="1/1").generate(longer, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(got, expected)


def test_prefill_waits_for_its_own_layers_rows_only(monkeypatch, device):
    """Every layer's allocation is held until the layer before it is prefilled: nobody waits earlier."""
    layers, tokens = 3, 130
    model, ids = random_llama(layers=layers, device=device), random_ids(tokens, device=device)
    reached = [threading.Event() for _ in range(layers + 1)]
    reached[0].set()
    in_time: list[bool] = []
    populated = RowMemory._populated

    def slow(*arguments):
        in_time.append(reached[len(in_time)].wait(60))
        return populated(*arguments)

    def on_prefill(done, total):
        assert total == layers * tokens
        reached[done // tokens].set()

    monkeypatch.setattr(RowMemory, "_populated", slow)
    offloaded(model, budget=24).generate(ids, max_new_tokens=2, do_sample=False, on_prefill=on_prefill)
    assert in_time == [True] * layers


@pytest.mark.parametrize("length", [3, 30, 300])
def test_a_long_prefill_takes_the_slots_memory(monkeypatch, device, length):
    """No slots while it runs; what comes after is as in fresh caches, graph or not."""
    model, small = random_llama(device=device), {"budget": 24, "slots": 40}
    ids = [random_ids(length, seed=seed, device=device) for seed in range(3)]
    expected = [logits_of(offloaded(model, **small).generate, prompt, 6) for prompt in ids]
    question = torch.cat([expected[2][0], random_ids(5, seed=9, device=device)], 1)
    monkeypatch.setattr("offload_runtime.session.KEEP_SLOTS_TOKENS", 0)
    runtime = offloaded(model, **small)
    held: list[bool] = []

    def on_prefill(*_):
        held.extend(c.resident._slots is not None for c in runtime._session.caches)

    for prompt, (expected_ids, expected_logits) in zip(ids, expected, strict=True):
        got_ids, got_logits = logits_of(runtime.generate, prompt, 6, on_prefill=on_prefill)
        assert torch.equal(got_ids, expected_ids)
        assert torch.equal(got_logits, expected_logits)
    assert held
    assert not any(held)
    monkeypatch.setattr("offload_runtime.session.KEEP_SLOTS_TOKENS", 100)
    slots = runtime._session.caches[0].resident.slots
    _, got = logits_of(runtime.generate, question, 6, resume=True)
    assert runtime._session.caches[0].resident.slots is slots
    other = offloaded(model, **small)
    other.generate(ids[2], max_new_tokens=6, do_sample=False)
    _, want = logits_of(other.generate, question, 6, resume=True)
    assert torch.equal(got, want)


def test_slots_are_made_before_the_step_that_uses_them(monkeypatch, device):
    """Made within it, on a prediction's stream, they would be filled from memory given back already."""
    monkeypatch.setattr("offload_runtime.session.KEEP_SLOTS_TOKENS", 0)
    plain, seen = Prefetcher.before_layer, []

    def before_layer(self, index, hidden, arguments):
        seen.append(all(cache.resident._slots is not None for cache in self.caches.values()))
        plain(self, index, hidden, arguments)

    monkeypatch.setattr(Prefetcher, "before_layer", before_layer)
    runtime = offloaded(random_llama(device=device, layers=3), budget=12)
    for seed in (0, 1):  # the second frees the slots that the first's steps used
        logits_of(runtime.generate, random_ids(200, seed=seed, device=device), 4)
    assert seen
    assert all(seen)
