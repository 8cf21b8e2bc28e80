"""Mode "predict" with sticky selection: steps attend to predictions, true queries say what stays and comes."""

import pytest
import torch

from offload_runtime.cache.layer_cache import PREDICTED, TRUE

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama

BUDGET, NEW = 64, 8


def runtime_of(slots: int = 2 * BUDGET, layers: int = 3, device: str = "cpu", **settings):
    settings = {"budget": BUDGET, "new_rows": NEW, "prefetch": "predict", **settings}
    model = random_llama(layers=layers, device=device)
    runtime = offloaded(model, slots=slots, **settings)
    runtime.calibration = identity_calibration(model)
    return runtime


def watch(session):
    """Records (layer, phase, history before, history after, tokens) of every selection from now on."""
    seen = []

    def watched(index, cache):
        plain = cache.select

        def select(query, scale, selection, work, phase):
            before = cache.history.clone()
            plain(query, scale, selection, work, phase)
            seen.append((index, phase, before, cache.history.clone(), selection.tokens.clone()))

        cache.select = select

    for index, cache in session.offloaded.items():
        watched(index, cache)
    return seen


def test_a_predicted_layer_selects_twice_and_remembers_its_true_selection():
    runtime = runtime_of()
    ids = runtime.generate(random_ids(500), max_new_tokens=3, do_sample=False)
    session = runtime._session
    seen = watch(session)
    session.step(ids[:, -1])
    # Layer 0 is never predicted; a layer attends, and then its true query selects.
    order = [(index, phase) for index, phase, *_ in seen]
    assert order == [(0, TRUE), (1, PREDICTED), (2, PREDICTED), (1, TRUE), (2, TRUE)]
    sinks = session.layout.sinks
    for index, phase, before, after, tokens in seen:
        if phase == PREDICTED:
            assert torch.equal(before, after)
            continue
        for head, chosen in enumerate(tokens[0].long()):
            newest = (after[0, head] & 1).nonzero().flatten() + sinks
            assert newest.tolist() == chosen.tolist(), index


def test_a_step_attends_to_the_prediction():
    runtime = runtime_of()
    ids = runtime.generate(random_ids(500), max_new_tokens=3, do_sample=False)
    session = runtime._session
    seen, attended = watch(session), {}
    for index, cache in session.offloaded.items():
        plain = cache.attend

        def attend(query, selection, *rest, index=index, plain=plain):
            attended[index] = selection.tokens.clone()
            return plain(query, selection, *rest)

        cache.attend = attend
    session.step(ids[:, -1])
    expected = {index: tokens for index, phase, _, _, tokens in seen if (phase == PREDICTED) == (index > 0)}
    assert attended.keys() == expected.keys() == {0, 1, 2}
    assert all(torch.equal(attended[index], expected[index]) for index in attended)


def test_the_two_selections_share_the_new_rows():
    runtime = runtime_of(layers=2)
    runtime.generate(random_ids(900), max_new_tokens=40, do_sample=False)
    session = runtime._session
    steps, heads = 39, session.layout.kv_heads
    cache = session.offloaded[1]
    assert cache.new_rows == NEW // 2
    assert session.offloaded[0].new_rows == NEW  # not predicted, so it selects once
    (early, early_hits, _), (late, late_hits, _) = cache.counters[0].tolist()
    assert early == late == steps * heads * BUDGET
    moved = early - early_hits + late - late_hits
    assert 0 < late - late_hits  # the true query brings rows of its own
    assert moved <= heads * (2 * BUDGET + (steps - 1) * NEW)


@pytest.mark.parametrize("slots", [BUDGET, BUDGET + 10])
def test_slots_change_nothing_but_what_is_fetched(slots):
    ids = random_ids(400)

    def logits(count):
        return logits_of(runtime_of(slots=count).generate, ids, 10)[1]

    assert torch.equal(logits(slots), logits(400))


def test_exact_selection_has_no_follower():
    runtime = runtime_of(new_rows=None)
    runtime.generate(random_ids(300), max_new_tokens=2, do_sample=False)
    assert runtime._session.prefetcher.follower is None


def test_recall_is_known_when_the_true_query_selects_too():
    runtime = runtime_of()
    runtime.generate(random_ids(500), max_new_tokens=6, do_sample=False)
    recall = runtime.stats["prefetch_recall"]
    assert recall is not None and 0 < recall <= 1


@pytest.mark.gpu
def test_graph_and_plain_steps_agree():
    ids = random_ids(500, device="cuda")
    plain, replayed = (
        logits_of(runtime_of(layers=4, device="cuda", cuda_graph=graph).generate, ids, 12)[1]
        for graph in (False, True)
    )
    assert torch.equal(plain, replayed)
