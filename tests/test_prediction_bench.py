"""bench.prediction: corrections from one text, recalls on another."""

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.prediction import Learned
from offload_runtime.calibration_guess import measure_recalls, watch
from offload_runtime.input_guess import guess_rank

from .models import random_ids, random_llama


def test_recalls_of_every_layer_but_the_first_by_correction():
    adapter = ModelAdapter(random_llama())
    learned = Learned(adapter)
    for seed in (0, 1):
        watch(adapter, random_ids(300, seed=seed)[0], learned.learn, lambda *_: None)
    corrections = learned.corrections()
    rank = guess_rank(adapter.shape.hidden)
    assert list(corrections) == [
        "none",
        "shift",
        f"rank {rank // 4}",
        f"rank {rank // 2}",
        f"rank {rank}",
        "affine",
    ]
    recalls = measure_recalls(adapter, random_ids(200, seed=2)[0], corrections)
    assert list(recalls) == [1, 2]
    for layer in recalls.values():
        assert list(layer) == list(corrections)
        assert all(0 < recall <= 1 for recall in layer.values())
