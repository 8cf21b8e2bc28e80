"""OffloadedCache in transformers' own generate, streamers and pipelines."""

import runpy
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline, TextIteratorStreamer

from offload_runtime import OffloadedCache, RuntimeConfig, session
from offload_runtime.errors import UserError
from offload_runtime.model_check import embedded_model
from offload_runtime.prefill import PrefillRun

from .architectures import random_model
from .models import logits_of, offloaded, random_ids, random_llama

# transformers renames the argument to cache from 5.24 on; the old name works until 6.0.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")

NEW_TOKENS = 8
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def cache_of(model, **settings) -> OffloadedCache:
    small = {"ctx": 512, "sinks": 4, "recent": 16, "chunk_tokens": 64, "budget": "1/1", **settings}
    return OffloadedCache(model, RuntimeConfig(**small))


@pytest.mark.parametrize("name", ["llama3 rope", "gemma3", "phi3, longrope", "gpt-oss", "qwen3 moe"])
def test_generate_at_full_budget_equals_transformers(device, name):
    model, ids = random_model(name, device), random_ids(90, device=device)
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(model.generate, ids, NEW_TOKENS, past_key_values=cache_of(model))
    assert torch.equal(got_ids, expected_ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    again, _ = logits_of(
        model.generate, ids, NEW_TOKENS
    )  # the model's forward is its own without such a cache
    assert torch.equal(again, expected_ids)


@pytest.mark.parametrize("prefetch", ["correct", "predict", "off"])
def test_generate_at_a_small_budget_equals_the_runtime(device, prefetch):
    model, ids = random_llama(device=device), random_ids(200, device=device)
    settings = {"ctx": 256, "budget": 24, "prefetch": prefetch}
    _, expected = logits_of(offloaded(model, **settings).generate, ids, NEW_TOKENS)
    _, got = logits_of(model.generate, ids, NEW_TOKENS, past_key_values=cache_of(model, **settings))
    assert torch.equal(got, expected)


def test_ragged_batch_sampling_and_scores(device):
    model = random_llama(device=device)
    ids, mask = random_ids(60, batch=2, device=device), torch.ones(2, 60, dtype=torch.long, device=device)
    ids[1, :35], mask[1, :35] = 0, 0
    options = {"attention_mask": mask, "do_sample": True, "top_k": 20, "max_new_tokens": NEW_TOKENS}
    torch.manual_seed(5)
    expected = model.generate(ids, **options)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, past_key_values=cache_of(model), **options), expected)


def test_the_next_call_computes_only_what_is_new(device, monkeypatch):
    model, cache_settings = random_llama(device=device), {"ctx": 512}
    cache = cache_of(model, **cache_settings)
    fresh = []  # tokens that each prefill computes

    class Watched(PrefillRun):
        def run(self, token_ids: torch.Tensor) -> torch.Tensor:
            fresh.append(token_ids.shape[1])
            return super().run(token_ids)

    monkeypatch.setattr(session, "PrefillRun", Watched)
    first = model.generate(
        random_ids(100, device=device), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    longer = torch.cat([first, random_ids(20, seed=3, device=device)], 1)
    second = model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert fresh == [100, 21]  # the last token of call one was never run
    assert torch.equal(second, model.generate(longer, max_new_tokens=4, do_sample=False))
    other = random_ids(50, seed=8, device=device)  # something else altogether needs no reset
    expected = model.generate(other, max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(other, past_key_values=cache, max_new_tokens=4, do_sample=False), expected
    )
    one = random_ids(1, device=device)  # one token, on a cache that holds more: a prompt, not the next token
    got = model.generate(one, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, model.generate(one, max_new_tokens=4, do_sample=False))
    cache.reset()
    assert torch.equal(
        model.generate(other, past_key_values=cache, max_new_tokens=4, do_sample=False), expected
    )


def test_what_it_does_not_do_is_one_line(device):
    model, ids = random_llama(device=device), random_ids(40, device=device)
    with pytest.raises(UserError, match="beam search"):
        model.generate(ids, past_key_values=cache_of(model), num_beams=2, max_new_tokens=3)
    with pytest.raises(UserError, match="whole conversation"):
        model.generate(ids, past_key_values=cache_of(model), prefill_chunk_size=16, max_new_tokens=3)
    embeds = model.model.embed_tokens(ids)
    with pytest.raises(UserError, match="takes input_ids"):
        model.generate(inputs_embeds=embeds, past_key_values=cache_of(model), max_new_tokens=3)
    with pytest.raises(UserError, match="do not fit into ctx 32"):
        model.generate(ids, past_key_values=cache_of(model, ctx=32), max_new_tokens=3)
    with pytest.raises(UserError, match="do not fit into ctx 41"):
        model.generate(ids, past_key_values=cache_of(model, ctx=41), max_new_tokens=3)


@pytest.fixture(scope="module")
def tiny() -> tuple:
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(embedded_model())


def test_text_generation_pipeline(tiny):
    model, tokenizer = tiny
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 10, "do_sample": False}
    prompts = ["The river runs past the town of ", "It was late in the year when "]
    expected = [pipe(prompt, **options) for prompt in prompts]
    cache = cache_of(model)
    assert [pipe(prompt, past_key_values=cache, **options) for prompt in prompts] == expected
    assert pipe(prompts, past_key_values=cache, **options) == expected


def test_text_iterator_streamer(tiny):
    model, tokenizer = tiny
    inputs = tokenizer("The river runs past ", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"past_key_values": cache_of(model), "max_new_tokens": 10, "do_sample": False}
    thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "".join(pieces) == tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 1


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples_run(example, monkeypatch, capsys):
    """In this process: a process of its own takes five seconds to import what is here already."""
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    assert capsys.readouterr().out.strip()
