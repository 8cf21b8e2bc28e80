"""Every family against untouched transformers: exact at full budget, whatever prefetch does, in batches."""

import pytest
import torch
import transformers

from offload_runtime.adapter import ModelAdapter
from offload_runtime.architectures import capturable_experts
from offload_runtime.cache.window_cache import WindowCache
from offload_runtime.calibration_collect import attend
from offload_runtime.errors import UserError
from offload_runtime.model_check import check_config

from .architectures import FAMILIES, WINDOW, random_model
from .models import logits_of, offloaded, random_ids

NEW_TOKENS = 32
PROMPT = 90  # past the window, two chunks, and past the 64 positions of the scaled rotary tables

# Logits spread over about +-10; float32 sums in another order move them by 1e-4 at most (measured).
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("name", FAMILIES)
def test_full_budget_equals_transformers(device, name):
    model, ids = random_model(name, device), random_ids(PROMPT, device=device)
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(offloaded(model, budget="1/1").generate, ids, NEW_TOKENS)
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert expected.std() > 0.5  # flat logits would agree whatever attention did


@pytest.mark.parametrize("name", FAMILIES)
def test_correct_prefetch_equals_off_bit_for_bit(device, name):
    model, ids = random_model(name, device), random_ids(PROMPT, device=device)
    settings = {"budget": 12, "slots": 16}
    _, off = logits_of(offloaded(model, prefetch="off", **settings).generate, ids, 8)
    runtime = offloaded(model, prefetch="correct", **settings)
    _, correct = logits_of(runtime.generate, ids, 8)
    assert torch.equal(off, correct)
    assert runtime.stats["cuda_graph"] == (device == "cuda")
    _, dense = logits_of(offloaded(model, budget="1/1").generate, ids, 8)
    offloads = any(layer["selected"] for layer in runtime.stats["layers"])
    assert torch.allclose(dense, correct, atol=1e-4) != offloads  # a budget of 12 is felt wherever it applies


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_batch_equals_one_by_one(device, name):
    model = random_model(name, device)
    prompts = [random_ids(length, seed=length, device=device)[0] for length in (7, PROMPT, 40)]
    if "longrope" in name:  # one choice of frequencies for a batch: all prompts on the same side
        prompts = [random_ids(length, seed=length, device=device)[0] for length in (70, PROMPT, 81)]
    ids = torch.zeros(3, PROMPT, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, PROMPT - len(prompt) :], mask[row, PROMPT - len(prompt) :] = prompt, 1
    _, got = logits_of(offloaded(model, budget="1/1").generate, ids, 6, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        _, alone = logits_of(model.generate, prompt[None], 6)
        torch.testing.assert_close(got[:, row : row + 1], alone, **TOLERANCE)


SLIDING = {"mistral, sliding": 3, "qwen2, sliding": 2, "gemma2": 2, "gemma3": 2, "gpt-oss": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_sliding_layers_keep_their_window_on_the_device_and_nothing_else(device, name):
    runtime = offloaded(random_model(name, device), budget="1/1")
    runtime.generate(random_ids(PROMPT, device=device), max_new_tokens=3, do_sample=False)
    session = runtime._session
    rings = [cache.window for cache in session.caches if isinstance(cache, WindowCache)]
    assert rings == [WINDOW] * SLIDING.get(name, 0)
    assert session.layout.layers == len(session.caches) - len(rings)
    assert [layer.get("window") for layer in runtime.stats["layers"] if "window" in layer] == rings


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "mistral, sliding"])
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1])
def test_windows_at_their_boundaries(device, name, length):
    model, ids = random_model(name, device), random_ids(length, device=device)
    _, expected = logits_of(model.generate, ids, 5)
    _, got = logits_of(offloaded(model, budget="1/1").generate, ids, 5)
    torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("prefetch", ["correct", "predict"])
@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_window_memory_that_was_never_written_is_never_read(poisoned, device, name, prefetch):
    model, ids = random_model(name, device), random_ids(WINDOW // 2, device=device)
    _, logits = logits_of(offloaded(model, budget=4, prefetch=prefetch).generate, ids, 6)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["gemma3", "mistral, sliding"])
@pytest.mark.parametrize("shared", ["all", "part"])
def test_conversation_resumes_with_sliding_layers(device, name, shared):
    """All cached tokens shared: the ring serves. Part of them: the ring has lost rows, start anew."""
    model = random_model(name, device)
    talk = offloaded(model, budget="1/1")
    turn = talk.generate(random_ids(PROMPT, device=device), max_new_tokens=6, do_sample=False)
    kept = turn if shared == "all" else turn[:, : PROMPT // 2]
    longer = torch.cat([kept, random_ids(30, seed=9, device=device)], 1)
    seen = []
    _, again = logits_of(
        talk.generate, longer, 6, resume=True, on_prefill=lambda _, total: seen.append(total)
    )
    _, fresh = logits_of(model.generate, longer, 6)
    torch.testing.assert_close(again, fresh, **TOLERANCE)
    fresh_tokens = 31 if shared == "all" else longer.shape[1]
    assert seen[-1] == fresh_tokens * model.config.num_hidden_layers


def test_a_layer_begins_to_slide_when_the_caches_outgrow_its_window(device):
    model = random_model("mistral, sliding", device, sliding_window=1030, max_position_embeddings=4096)
    talk = offloaded(model, budget="1/1")
    turn = talk.generate(random_ids(1000, device=device), max_new_tokens=6, do_sample=False)
    assert not any(isinstance(cache, WindowCache) for cache in talk._session.caches)
    longer = torch.cat([turn, random_ids(40, seed=9, device=device)], 1)
    _, again = logits_of(talk.generate, longer, 6, resume=True)
    assert all(isinstance(cache, WindowCache) for cache in talk._session.caches)
    _, fresh = logits_of(model.generate, longer, 6)
    torch.testing.assert_close(again, fresh, **TOLERANCE)


def test_prediction_turns_by_the_rotary_table_of_the_predicted_layer(device):
    """Gemma 3's sliding layers have another table than its global ones, which follow them."""
    adapter = ModelAdapter(random_model("gemma3", device))
    seen = {}

    def observe(index, hidden, keywords):
        seen[index] = hidden, keywords
        if index == 1:
            ahead, _ = adapter.predicted_query(1, seen[0][0], seen[0][1])  # with layer 0's arguments
            own, _ = adapter.predicted_query(1, seen[0][0], keywords)
            assert torch.equal(ahead, own)
            tables = [seen[i][1]["position_embeddings"][0] for i in (0, 1)]
            assert not torch.equal(*tables)
            assert ahead[..., 5:, :].std() > 0.1

    handlers = [attend] * len(adapter.layers)
    with torch.no_grad(), adapter.handled_by(handlers), adapter.observed_by(observe):
        adapter.model(random_ids(40, device=device), use_cache=False)
    assert set(seen) == {0, 1, 2, 3}


def test_longrope_is_chosen_by_the_longest_the_sequence_can_become(device):
    model = random_model("phi3, longrope", device)  # switches at 64 positions
    runtime = offloaded(model, budget="1/1")
    for length in (30, 70, 50):  # short, long, short again with the same runtime
        ids = random_ids(length, device=device)
        _, expected = logits_of(model.generate, ids, 6)
        _, got = logits_of(runtime.generate, ids, 6, resume=True)
        torch.testing.assert_close(got, expected, **TOLERANCE)
    ids = random_ids(
        62, device=device
    )  # crosses: long from the start, as transformers has it after the switch
    out, got = logits_of(runtime.generate, ids, 6)
    with torch.no_grad():
        whole = model(out[:, :-1]).logits[0, 61:]
        short = model(ids).logits[0, 61:]
    torch.testing.assert_close(got[:, 0], whole, **TOLERANCE)
    assert not torch.allclose(got[0], short, atol=1e-2)


def test_dynamic_rope_is_exact_within_its_trained_length_and_refused_beyond(device):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = random_model("llama2, MHA", device, rope_parameters=rope, max_position_embeddings=64)
    ids = random_ids(50, device=device)
    _, expected = logits_of(model.generate, ids, 6)
    _, got = logits_of(offloaded(model, budget="1/1").generate, ids, 6)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    with pytest.raises(UserError, match="64 that this model was trained for"):
        offloaded(model).generate(ids, max_new_tokens=20)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt-oss", "llama3 rope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_a_step_never_wait_for_the_gpu(device, name, dtype):
    model, ids = random_model(name, device).to(dtype), random_ids(1, batch=3, device=device)
    with torch.no_grad():
        before = model.config._experts_implementation
        plain = model(ids, use_cache=False).logits
        with capturable_experts(model):
            chosen = model.config._experts_implementation
            step = model(ids, use_cache=False).logits
    mixture = name != "llama3 rope"
    assert chosen == ("batched_mm" if mixture and dtype == torch.float32 else before)
    assert model.config._experts_implementation == before
    torch.testing.assert_close(step, plain, **TOLERANCE)


REFUSED = {
    "DeepseekV3Config": ({}, "multi-head latent attention, MLA"),
    "Qwen3NextConfig": ({}, "linear-attention"),
    "JambaConfig": ({}, "state-space"),
    "Mamba2Config": ({}, "state-space"),
    "FalconH1Config": ({}, "state-space"),
    "RecurrentGemmaConfig": ({}, "state-space, convolution or linear-attention|layers of type"),
    "T5Config": ({}, "encoder-decoder"),
    "GPT2Config": ({}, "no rotary position embedding"),
    "Llama4TextConfig": ({}, "chunked_attention"),
    "MptConfig": ({}, "no rotary position embedding"),
    "DiffLlamaConfig": ({}, "differential attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_of_another_kind_is_refused_by_name(name):
    settings, reason = REFUSED[name]
    config = getattr(transformers, name)(**settings)
    with pytest.raises(UserError, match=reason) as caught:
        check_config(config)
    assert config.model_type in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_that_the_config_does_not_tell_is_refused(device):
    model = random_model("mistral, sliding", device)
    runtime = offloaded(model)
    runtime.adapter.windows = (0, 0, 0)
    with pytest.raises(UserError, match="layer 0 attends to 24 tokens where the config says all"):
        runtime.generate(random_ids(40, device=device), max_new_tokens=2)
