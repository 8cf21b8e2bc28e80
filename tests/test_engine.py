"""The contracts of decoding, end to end on random models (CPU references or GPU kernels)."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama

EMBEDDED = Path(__file__).resolve().parent.parent / "offload_runtime" / "data" / "tiny-256k"
NEW_TOKENS = 6
# One below, at and above: sinks (4), sinks + recent (20), a chunk (64), two chunks, the capacity step (1024).
LENGTHS = [1, 4, 5, 19, 20, 21, 63, 64, 65, 127, 129, 1000]


@pytest.mark.parametrize(("query_heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 1, 128), (8, 1, 64)])
def test_full_budget_equals_transformers(device, query_heads, kv_heads, head_dim):
    model = random_llama(query_heads, kv_heads, head_dim, device=device)
    ids = random_ids(200, device=device)
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(offloaded(model, budget="1/1").generate, ids, NEW_TOKENS)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_embedded_model_at_full_budget_equals_transformers(device):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).to(device).eval()
    text = (EMBEDDED.parent / "prose.txt").read_text(encoding="utf-8")[:700]
    ids = AutoTokenizer.from_pretrained(EMBEDDED)(text, return_tensors="pt").input_ids.to(device)
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(offloaded(model, budget="1/1").generate, ids, NEW_TOKENS)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", LENGTHS)
def test_full_budget_at_every_boundary(device, length):
    model = random_llama(device=device)
    ids = random_ids(length, device=device)
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(offloaded(model, budget=4096).generate, ids, NEW_TOKENS)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 20, 21, 127, 500])
@pytest.mark.parametrize("new_rows", [None, 3])
def test_correct_prefetch_equals_off_bit_for_bit(device, length, new_rows):
    model, ids = random_llama(device=device), random_ids(length, device=device)
    settings = {"budget": 24, "slots": 40, "new_rows": new_rows}
    ids_off, off = logits_of(offloaded(model, prefetch="off", **settings).generate, ids, 12)
    ids_correct, correct = logits_of(offloaded(model, prefetch="correct", **settings).generate, ids, 12)
    assert torch.equal(ids_off, ids_correct)
    assert torch.equal(off, correct)


@pytest.mark.parametrize("new_rows", [None, 3])
def test_poor_predictions_of_every_layer_change_no_bit(device, new_rows):
    """The test above leaves to the prompt's calibration what is predicted: of random layers hardly any."""
    model, ids = random_llama(device=device), random_ids(300, device=device)

    def logits(prefetch: str) -> torch.Tensor:
        runtime = offloaded(model, budget=24, slots=40, new_rows=new_rows, prefetch=prefetch)
        runtime.calibration = identity_calibration(model)
        found = logits_of(runtime.generate, ids, 12)[1]
        recall = runtime.stats["prefetch_recall"]
        assert (prefetch == "correct") == (recall is not None and 0 < recall < 0.9)
        return found

    assert torch.equal(logits("correct"), logits("off"))


@pytest.mark.parametrize("slots", [24, 25, 100])
def test_where_a_row_lies_changes_nothing(device, slots):
    model, ids = random_llama(device=device), random_ids(300, device=device)
    _, few = logits_of(offloaded(model, budget=24, slots=slots, prefetch="off").generate, ids, 12)
    _, many = logits_of(offloaded(model, budget=24, slots=1000, prefetch="correct").generate, ids, 12)
    assert torch.equal(few, many)


def test_sparse_differs_from_dense(device):
    """The tests above would pass if the budget were ignored; this one would not."""
    model, ids = random_llama(device=device), random_ids(500, device=device)
    _, dense = logits_of(offloaded(model, budget="1/1").generate, ids, NEW_TOKENS)
    _, sparse = logits_of(offloaded(model, budget=8).generate, ids, NEW_TOKENS)
    assert not torch.allclose(dense[1:], sparse[1:], atol=1e-3)
    torch.testing.assert_close(dense[0], sparse[0])  # prefill is exact whatever the budget


@pytest.mark.parametrize("prefetch", ["correct", "predict", "off"])
@pytest.mark.parametrize("length", [1, 63, 127, 1000])
def test_uninitialised_memory_is_never_used(poisoned, device, prefetch, length):
    model, ids = random_llama(device=device), random_ids(length, device=device)
    _, logits = logits_of(offloaded(model, budget=24, prefetch=prefetch).generate, ids, NEW_TOKENS)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", ["1/1", 24])
def test_batch_equals_one_by_one(device, side, budget):
    model = random_llama(device=device)
    calibration = identity_calibration(model)  # a fixed one: self-calibration looks at one prompt
    lengths = [5, 150, 40]
    prompts = [random_ids(n, seed=n, device=device)[0] for n in lengths]
    ids = torch.zeros(3, 150, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(150 - len(prompt), 150) if side == "left" else slice(0, len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    batch_model = offloaded(model, budget=budget)
    batch_model.calibration = calibration
    out = batch_model.generate(ids, mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(out[:, :150], ids)
    for row, prompt in enumerate(prompts):
        single = offloaded(model, budget=budget)
        single.calibration = calibration
        alone = single.generate(prompt[None], max_new_tokens=NEW_TOKENS, do_sample=False)
        assert out[row, 150:].tolist() == alone[0, len(prompt) :].tolist()


def test_second_call_starts_clean(device):
    model = random_llama(device=device)
    runtime = offloaded(model, budget=24)
    first, second = random_ids(300, seed=1, device=device), random_ids(310, seed=2, device=device)
    expected = offloaded(model, budget=24).generate(second, max_new_tokens=NEW_TOKENS, do_sample=False)
    runtime.generate(first, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(runtime.generate(second, max_new_tokens=NEW_TOKENS, do_sample=False), expected)


@pytest.mark.parametrize("length", [100, 1020])  # 1,020: the second turn needs larger caches
def test_conversation_resumes_from_the_cache(device, length):
    model = random_llama(device=device)
    talk = offloaded(model, budget="1/1")
    turn = talk.generate(random_ids(length, device=device), max_new_tokens=NEW_TOKENS, do_sample=False)
    longer = torch.cat([turn, random_ids(30, seed=9, device=device)], 1)
    seen = []
    again = talk.generate(
        longer,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        resume=True,
        on_prefill=lambda d, t: seen.append(t),
    )
    fresh = model.generate(longer, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(again, fresh)
    assert seen[-1] == 31 * model.config.num_hidden_layers  # the last token of turn one was never run


def test_sampling_with_a_seed_repeats_and_follows_transformers(device):
    model, ids = random_llama(device=device), random_ids(80, device=device)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    runtime = offloaded(model, budget="1/1", seed=3)
    first = runtime.generate(ids, max_new_tokens=10, **options)
    assert torch.equal(runtime.generate(ids, max_new_tokens=10, **options), first)
    torch.manual_seed(3)
    assert torch.equal(model.generate(ids, max_new_tokens=10, **options), first)


def test_stopping_streaming_and_dict_mean_what_transformers_means(device):
    model, ids = random_llama(device=device), random_ids(50, device=device)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    stop = int(expected[0, 55])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": stop}

    class Collect:
        def __init__(self):
            self.chunks, self.ended = [], False

        def put(self, value):
            self.chunks.append(value.reshape(-1))

        def end(self):
            self.ended = True

    streamer = Collect()
    got = offloaded(model, budget="1/1").generate(ids, streamer=streamer, **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert torch.equal(torch.cat(streamer.chunks), got[0].cpu())
    assert streamer.ended


def test_stats_add_up(device):
    model, ids = random_llama(device=device), random_ids(300, device=device)
    runtime = offloaded(model, budget=24, slots=30)
    runtime.calibration = identity_calibration(model)  # predicts every layer but the first
    runtime.generate(ids, max_new_tokens=9, do_sample=False)
    stats = runtime.stats
    kv_heads, steps = model.config.num_key_value_heads, 8
    for index, layer in enumerate(stats["layers"]):
        assert layer["selected"] == 24 * kv_heads * steps
        assert layer["hits"] + layer["misses"] == layer["selected"]
        assert (layer["prefetched"] == 0) == (index == 0)
        assert layer["bytes"] == (layer["misses"] + layer["prefetched"]) * 2 * 64 * 4
    assert stats["gather_gb"] == pytest.approx(sum(layer["bytes"] for layer in stats["layers"]) / 1e9)
    assert 0 < stats["hit_rate"] < 1
    assert 0 < stats["prefetch_recall"] < 1
    assert stats["ttft_s"] > 0
    assert stats["tpot_s"] > 0
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (300, 9)
