"""bench.sticky: selections that may take few new tokens, against exact ones."""

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.sticky import VARIANTS, label_scores, masses, means, measure, select
from offload_runtime.calibration_collect import calibrate_prompt
from offload_runtime.calibration_guess import watch

from .models import random_ids, random_llama


def test_selection_by_hand():
    """Two tokens of 32 are selected; the best ones move on by one, jump away, and come back."""
    scores = (torch.arange(32) * -1e-3).repeat(1, 4, 1)
    for step, (best, second) in enumerate([(2, 3), (3, 4), (10, 11), (2, 4)]):
        scores[0, step, best], scores[0, step, second] = 2.0, 1.0
    far, mass = torch.ones(4, 32, dtype=torch.bool), scores.clamp_min(0) / 3
    assert select(scores, far, mass, None, 1) == (1.0, 5 / 3)
    held, new = select(scores, far, mass, 1, 1)  # one of the third step's two, and of the fourth's
    assert (round(held, 5), new) == (round((1 + 1 + 2 / 3 + 2 / 3) / 4, 5), 1.0)
    # The third step chooses tokens 10 and 2 (of the first step's), so that the fourth lacks 4 alone; of four
    # tokens in two steps only the last step's two are remembered.
    held, new = select(scores, far, mass, 1, 4)
    assert (round(held, 5), new) == (round((1 + 1 + 2 / 3 + 1) / 4, 5), 1.0)


def test_labels_of_full_width_score_as_keys_do():
    adapter, ids = ModelAdapter(random_llama(kv_heads=4)), random_ids(300)
    calibration = calibrate_prompt(adapter, ids[0], 64, positions=4096)  # R = D: nothing is lost
    calls = {}

    def look(index, call):
        mass, far = masses(call, 8)
        scores = label_scores(call, calibration, index, far)
        for step in range(8):
            order = (scores[:, step].masked_fill(~far[step], -1)).argsort(-1, descending=True)[:, :10]
            exact = mass[:, step].masked_fill(~far[step], -1).topk(10).values
            calls[index, step] = (mass[:, step].gather(1, order), exact)

    watch(adapter, ids[0], lambda *_: None, look)
    for found, exact in calls.values():
        torch.testing.assert_close(found.sum(-1), exact.sum(-1), rtol=1e-3, atol=1e-5)


def test_every_variant_of_every_layer():
    adapter, ids = ModelAdapter(random_llama()), random_ids(400)[0]
    calibration = calibrate_prompt(adapter, ids, 16, positions=4096)
    lines = means(measure(adapter, calibration, ids, 6))
    assert len(lines) == 2 * (1 + len(VARIANTS))
    for line in lines:
        assert 0 < line["mass"] <= 1
        assert line["of exact selection"] <= 1.0001 or line["scores"] == "labels"
