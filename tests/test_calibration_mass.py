"""Mass held by budgets: the measurement by hand, what is read from it, and its way into decoding."""

from dataclasses import replace

import pytest
import torch

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.adapter import ModelAdapter
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_collect import calibrate_prompt
from offload_runtime.calibration_mass import (
    BUDGETS,
    CONTEXTS,
    RECENT,
    SINKS,
    MassCurve,
    MassSums,
    held_by_budgets,
    query_places,
)
from offload_runtime.errors import UserError

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama
from .tiny_model import tiny_llama


def curve(needs, contexts=(256, 512, 1024)):
    """A curve that holds exactly 0.875 at needs[layer][KV head][context], a power of two."""
    held = torch.full((len(needs), len(needs[0]), len(contexts), len(BUDGETS)), 0.5)
    for layer, heads in enumerate(needs):
        for head, row in enumerate(heads):
            for c, need in enumerate(row):
                at = BUDGETS.index(need)
                held[layer, head, c, at:] = torch.linspace(0.875, 1, len(BUDGETS) - at)
    return MassCurve(held, contexts)


def test_held_mass_by_hand():
    mass = torch.zeros(1, 200)
    mass[0, 3], mass[0, 150], mass[0, 50], mass[0, 60] = 0.2, 0.3, 0.4, 0.1  # a sink, a recent one, two far
    held = held_by_budgets(mass)[0]
    torch.testing.assert_close(held[:3], torch.tensor([0.9, 1.0, 1.0]))
    assert SINKS > 3
    assert 200 - RECENT <= 150


def test_places_lie_within_a_sixteenth_below_their_context():
    places, contexts = query_places(600)
    assert [CONTEXTS[c] for c in contexts] == [256] * 4 + [512] * 4
    for place, context in zip(places.tolist(), contexts, strict=True):
        assert 15 / 16 * CONTEXTS[context] < place + 1 <= CONTEXTS[context]
    assert query_places(100)[1] == []
    assert MassCurve.of([MassSums(2)]) is None


def test_budgets_between_below_and_beyond_the_measured_contexts():
    growing, constant = [16, 32, 64], [8, 8, 8]
    made = curve([[growing, constant]])
    assert made.budgets(0.875, 512) == [[32, 8]]
    assert made.budgets(0.875, 724) == [[46, 8]]  # half way in logarithms: 2^5.5 = 45.25, rounded up
    assert made.budgets(0.875, 128) == [[8, 4]]
    assert made.budgets(0.875, 262144) == [[16384, 8]]  # a sixteenth goes on, a constant too
    (more,) = made.budgets(0.95, 512)
    assert more[0] > 32
    assert more[1] > 8


def test_measured_by_calibration_and_kept_in_the_file(tmp_path):
    adapter = ModelAdapter(tiny_llama())
    made = calibrate_prompt(adapter, torch.arange(3, 263).repeat(3)[:700], 8, positions=4096)
    assert made.mass_curve.contexts == (256, 512)
    held = made.mass_curve.held
    assert held.shape == (3, 2, 2, len(BUDGETS))
    assert (held.diff(dim=-1) >= -1e-6).all()
    torch.testing.assert_close(held[..., 8:], torch.ones_like(held[..., 8:]), atol=0.2, rtol=0)
    torch.testing.assert_close(held[..., 9:], torch.ones_like(held[..., 9:]))  # 512 tokens hold everything
    made.save(tmp_path / "c")
    read = Calibration.load(tmp_path / "c").mass_curve
    assert torch.equal(read.held, held)
    assert read.contexts == (256, 512)


def with_curve(model, needs, contexts=(256, 512, 1024)):
    """A model's calibration by identity with a made curve."""
    plain = identity_calibration(model)
    return replace(plain, mass_curve=curve(needs, contexts))


def runtime(model, needs=None, **settings):
    made = offloaded(model, **settings)
    made.calibration = with_curve(model, needs) if needs else identity_calibration(model)
    return made


# Constant in the context, so K is the least, 128 and, capped, 200; a layer's two KV heads differ.
LOW, MIDDLE, HIGH = [4] * 3, [128] * 3, [512] * 3
NEEDS = [[LOW, MIDDLE], [MIDDLE, HIGH], [HIGH, HIGH]]
BUDGETS_OF_NEEDS = [[64, 128], [128, 200], [200, 200]]


def test_every_kv_head_gets_its_own_budget_within_the_cap():
    model, ids = random_llama(), random_ids(400)
    made = runtime(model, NEEDS, budget=200, budget_mass=0.875)
    made.generate(ids, max_new_tokens=9, do_sample=False)
    layers, steps = made.stats["layers"], 8
    assert [layer["budgets"] for layer in layers] == [[heads] for heads in BUDGETS_OF_NEEDS]
    assert [layer["selected"] for layer in layers] == [sum(heads) * steps for heads in BUDGETS_OF_NEEDS]
    assert made.stats["budget_tokens"] == pytest.approx(920 / 6)
    selection = made._session.prefetcher.selection  # the last layer's, of the last step
    assert (selection.tokens >= 0).sum(-1).tolist() == [BUDGETS_OF_NEEDS[-1]]
    fixed = runtime(model, budget=200)
    fixed.generate(ids, max_new_tokens=9, do_sample=False)
    assert made._session.layout == fixed._session.layout  # the same slots, so the plan is the cap's
    assert fixed.stats["budget_tokens"] == 200


def test_equal_needs_are_the_fixed_budget_bit_for_bit():
    model, ids = random_llama(), random_ids(300)
    _, fixed = logits_of(runtime(model, budget=128).generate, ids, 8)
    equal = runtime(model, [[MIDDLE] * 2] * 3, budget=200, budget_mass=0.875)
    _, adaptive = logits_of(equal.generate, ids, 8)
    assert equal.stats["budget_tokens"] == 128
    torch.testing.assert_close(adaptive, fixed, rtol=1e-5, atol=1e-5)  # buffers of 200: other summation order
    above = runtime(model, [[HIGH] * 2] * 3, budget=128, budget_mass=0.875)
    _, capped = logits_of(above.generate, ids, 8)
    assert torch.equal(capped, fixed)  # the cap is the same budget in the same buffers


@pytest.mark.parametrize("new_rows", [None, 3])
def test_correct_prefetch_equals_off_with_adaptive_budgets(new_rows):
    model, ids = random_llama(), random_ids(400)
    settings = {"budget": 200, "slots": 220, "budget_mass": 0.875, "new_rows": new_rows}
    _, off = logits_of(runtime(model, NEEDS, prefetch="off", **settings).generate, ids, 10)
    _, correct = logits_of(runtime(model, NEEDS, prefetch="correct", **settings).generate, ids, 10)
    assert torch.equal(off, correct)
    _, fixed = logits_of(runtime(model, prefetch="off", budget=200, new_rows=new_rows).generate, ids, 10)
    assert not torch.equal(off, fixed)


def test_a_batch_has_budgets_by_its_lengths():
    model = random_llama()
    growing = [[[64, 128, 256]] * 2] * 3  # a quarter of the context
    made = runtime(model, growing, budget=256, budget_mass=0.875)
    ids = random_ids(500, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :250] = 0  # 250 tokens, padded on the left
    made.generate(ids, mask, max_new_tokens=12, do_sample=False)
    assert made.stats["layers"][0]["budgets"] == [[128, 128], [66, 66]]  # of 512 and 262 tokens


def test_a_calibration_that_measured_nothing_is_refused_and_a_short_prompt_is_not():
    model = random_llama()
    with pytest.raises(UserError, match="ds-offload calibrate"):
        OffloadedModel(model, RuntimeConfig(budget_mass=0.9), calibration=identity_calibration(model))
    with pytest.raises(UserError, match=r"budget_mass is 98"):
        RuntimeConfig(budget_mass=98)
    made = offloaded(model, budget=24, budget_mass=0.9)  # calibrates itself
    made.generate(random_ids(100), max_new_tokens=2, do_sample=False)
    assert made.stats["budget_tokens"] == 24
    made.generate(random_ids(600), max_new_tokens=2, do_sample=False)
    assert all(max(layer["budgets"][0]) <= 24 for layer in made.stats["layers"])
    assert made._session.calibration.mass_curve is not None
