"""How many new rows a step: what the setting means, and that caches select by it."""

import pytest
import torch

from offload_runtime.config import RuntimeConfig
from offload_runtime.errors import UserError

from .models import logits_of, offloaded, random_ids, random_llama


@pytest.mark.parametrize(
    ("ctx", "budget", "new_rows", "expected"),
    [
        (262144, "1/16", "auto", 2048),  # an eighth of 16,384
        (262144, "1/4", "auto", 8192),
        (131072, "1/16", "auto", 2048),  # a quarter of 8,192
        (65536, "1/16", "auto", 2048),  # half of 4,096
        (32768, "1/16", "auto", None),  # 2,048
        (262144, 2048, "auto", None),
        (262144, "1/1", "auto", None),  # dense
        (262144, "1/16", None, None),
        (262144, "1/16", "none", None),
        (262144, "1/16", 512, 512),
        (262144, "1/16", "1/32", 512),
        (4096, "1/16", "1/8", 32),
        (4096, 4, "1/8", 1),
        (4096, 64, 64, None),  # nothing that it bounds
    ],
)
def test_what_the_setting_means(ctx, budget, new_rows, expected):
    config = RuntimeConfig(ctx=ctx, budget=budget, new_rows=new_rows)
    assert config.entering(config.budget_tokens(ctx)) == expected


def test_predicted_selections_are_exact_unless_asked_otherwise():
    assert RuntimeConfig(prefetch="predict").entering(16384) is None
    assert RuntimeConfig(prefetch="predict", new_rows=2048).entering(16384) == 2048


@pytest.mark.parametrize("new_rows", ["few", "0", -3, "3/2", "1/0", ""])
def test_bad_values_are_refused(new_rows):
    with pytest.raises(UserError, match="new_rows is"):
        RuntimeConfig(new_rows=new_rows)


def test_the_number_depends_on_ctx_alone():
    config = RuntimeConfig(ctx=262144, budget="1/16")
    numbers = {tokens: config.entering(config.budget_tokens(tokens)) for tokens in (32768, 65536, 262144)}
    assert numbers == {32768: None, 65536: 2048, 262144: 2048}  # 2,048 of 2,048 bound nothing


def test_caches_select_by_it():
    model, ids = random_llama(), random_ids(500)

    def run(new_rows):
        runtime = offloaded(model, budget=24, new_rows=new_rows)
        logits = logits_of(runtime.generate, ids, 6)[1]
        return logits, runtime._session.new_rows

    exact, unbound = run("none")
    auto, small = run("auto")
    sticky, bound = run("1/8")
    assert (unbound, small, bound) == (None, None, 3)
    assert torch.equal(exact, auto)
    assert torch.equal(exact[:2], sticky[:2])  # the prefill's logits and the first step's: chosen exactly
    assert not torch.equal(exact[2:], sticky[2:])


@pytest.mark.parametrize("slots", [24, 30, 48])
def test_slots_change_nothing_but_what_is_fetched(slots):
    model, ids = random_llama(), random_ids(300)

    def logits(count):
        runtime = offloaded(model, budget=24, new_rows=3, slots=count)
        return logits_of(runtime.generate, ids, 12)[1]

    assert torch.equal(logits(slots), logits(300))


def test_a_session_remembers_what_it_attended_to():
    runtime = offloaded(random_llama(), budget=24, new_rows=4, prefetch="correct")
    runtime.generate(random_ids(300), max_new_tokens=4, do_sample=False)
    cache = runtime._session.caches[1]
    assert int((cache.history & 1).sum()) == 2 * 24  # the third step's, the newest
    assert int((cache.history & 8).sum()) == 0
    runtime._session.clear_place(0)
    assert not cache.history.any()


def test_no_more_rows_move_than_may_enter():
    """Selections of random weights change at random, the hardest case; predictions move rows of their own."""
    runtime = offloaded(random_llama(layers=2), budget=64, new_rows=8, prefetch="off", slots=128)
    runtime.generate(random_ids(900), max_new_tokens=40, do_sample=False)
    session = runtime._session
    steps, heads = 39, session.layout.kv_heads
    for cache in session.offloaded.values():
        selected, hits, *_ = cache.counters[0, 1].tolist()
        assert selected == steps * heads * 64
        assert selected - hits <= heads * (64 + (steps - 1) * 8)
