"""What a layer adds to its input on average, and that predictions start from there."""

from dataclasses import replace

import pytest
import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.calibration_collect import Collection, calibrate_prompt
from offload_runtime.calibration_shift import SKIPPED_TOKENS, ShiftSums
from offload_runtime.input_guess import InputCorrection, shifted_layers

from .models import (
    check_predictions_matter_to_predict_only,
    identity_calibration,
    offloaded,
    random_ids,
    random_llama,
)


def test_means_leave_the_first_tokens_out_and_parts_add_up():
    before, after = torch.randn(100, 8), torch.randn(100, 8)
    after[:SKIPPED_TOKENS] += 1000  # attention sinks
    whole, parts = ShiftSums(), ShiftSums()
    whole.add(1, after, before)
    expected = (after - before)[SKIPPED_TOKENS:].mean(0)
    torch.testing.assert_close(whole.mean(1), expected)
    parts.add(1, after[:60], before[:60])
    parts.add(1, after[60 - SKIPPED_TOKENS :], before[60 - SKIPPED_TOKENS :])
    torch.testing.assert_close(parts.mean(1), expected)
    assert torch.equal(whole.means([False, True])[0], torch.zeros(8))


def test_too_few_tokens_shift_nothing():
    sums = ShiftSums()
    sums.add(1, torch.randn(5, 8), torch.randn(5, 8))
    assert torch.equal(sums.means([False, True]), torch.zeros(2, 8))
    assert sums.means([False, False]) is None


@pytest.mark.parametrize(
    ("plain", "shifted", "kept", "recall"),
    [(0.3, 0.8, True, 0.8), (0.3, 0.2, False, 0.3), (0.7, 0.9, False, 0.7), (0.3, 0.4, True, 0.4)],
)
def test_only_layers_that_predict_badly_are_shifted(plain, shifted, kept, recall):
    """Layer 1 of two; 0.5 is what a prediction is worth making from."""
    collection = Collection.of(2)
    collection.recalls[1], collection.shifted_recalls[1] = [plain], [shifted]
    assert collection.shifted() == [False, kept]
    assert collection.mean_recalls() == [0.0, recall]
    assert collection.unpredicted_layers() == ((0,) if recall >= 0.5 else (0, 1))


def test_a_calibration_has_the_shift_of_its_text(monkeypatch):
    monkeypatch.setattr(Collection, "shifted", lambda self: [False, True, False])
    model, ids = random_llama(), random_ids(200)
    made = calibrate_prompt(ModelAdapter(model), ids[0], 16, positions=4096)
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    moved = (inputs[1] - inputs[0])[SKIPPED_TOKENS:].mean(0)
    torch.testing.assert_close(made.input_shift[1], moved, rtol=1e-4, atol=1e-5)
    assert not made.input_shift[[0, 2]].any()
    assert shifted_layers(made.input_shift) == {1}


@pytest.mark.parametrize("known", [True, False])
def test_predictions_start_from_the_shifted_input(known, monkeypatch):
    model, ids = random_llama(), random_ids(120)
    calibration = identity_calibration(model)
    shift = torch.randn(3, model.config.hidden_size)
    shift[2] = 0  # predicted from the input as it is
    if known:
        calibration = replace(calibration, input_shift=shift)
    runtime = offloaded(model, budget=24, prefetch="correct")
    runtime.calibration = calibration
    asked: list[tuple[int, torch.Tensor]] = []
    inputs: dict[int, torch.Tensor] = {}
    plain = InputCorrection.shift_input

    def watched(self, index, hidden):
        asked.append((index, plain(self, index, hidden)))
        return asked[-1][1]

    monkeypatch.setattr(InputCorrection, "shift_input", watched)
    runtime.generate(ids, max_new_tokens=2, do_sample=False)  # one step
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, i=index: inputs.__setitem__(i, arguments[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    asked.clear()
    runtime._session.step(torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    assert [index for index, _ in asked] == [1, 2]
    for index, hidden in asked:
        expected = inputs[index - 1] + (shift[index] if known else 0)
        torch.testing.assert_close(hidden, expected)


def test_a_shift_changes_no_bit_of_correct():
    model, ids = random_llama(), random_ids(300)
    calibration = replace(identity_calibration(model), input_shift=torch.randn(3, model.config.hidden_size))
    check_predictions_matter_to_predict_only(model, ids, calibration)
