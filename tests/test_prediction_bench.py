"""bench.prediction: corrections from one text, recalls on another."""

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.prediction import RANKS, Found, Regression, measure, run

from .models import random_ids, random_llama


def test_guesses_are_the_best_of_their_rank():
    """What is added is affine of rank 3 here: rank 8 finds it all, a smaller one or none less."""
    torch.manual_seed(0)
    before = torch.randn(400, 24) + torch.randn(24)
    added = before @ (torch.randn(24, 3) @ torch.randn(3, 24)) + torch.randn(24)
    fitted = Regression.of(before[:200], before[:200] + added[:200])
    fitted.add(Regression.of(before[200:], before[200:] + added[200:]))
    errors = {rank: float((fitted.guess(rank)(before) - before - added).norm()) for rank in (1, 2, 3, None)}
    assert errors[1] > errors[2] > 10 * errors[3]
    assert errors[3] < 0.02 * float(added.norm())
    torch.testing.assert_close(errors[3], errors[None], rtol=0.05, atol=1e-3)


def test_recalls_of_every_layer_but_the_first():
    adapter, found = ModelAdapter(random_llama()), Found()
    run(adapter, random_ids(300)[0], found.learn, lambda *_: None)
    layers = measure(adapter, found, random_ids(200, seed=1)[0])
    assert len(layers) == 2
    for layer in layers:
        assert list(layer) == ["none", "shift", *(f"rank {rank}" for rank in RANKS), "affine"]
        assert all(0 < recall <= 1 for recall in layer.values())


def test_the_own_input_predicts_all():
    """Corrected to the layer's true input, a prediction is the query itself."""
    adapter, ids = ModelAdapter(random_llama()), random_ids(200)[0]
    inputs: dict[int, torch.Tensor] = {}
    run(adapter, ids, lambda index, hidden, *_: inputs.__setitem__(index, hidden.clone()), lambda *_: None)

    class Known(Found):
        def corrections(self, index):
            return {"true": lambda _: inputs[index]}

    assert [layer["true"] for layer in measure(adapter, Known(), ids)] == [1.0, 1.0]
