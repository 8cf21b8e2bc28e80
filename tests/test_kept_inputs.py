"""A layer's input is kept by reference only where the layer does not write into it."""

import pytest
import torch

from offload_runtime.prefetch.kept_inputs import KeptInputs

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama


def test_first_a_copy_then_the_input_itself():
    inputs, hidden = KeptInputs(), torch.ones(1, 1, 4)
    assert inputs.keep(1, hidden).data_ptr() != hidden.data_ptr()
    inputs.release(1)
    assert inputs.keep(1, hidden) is hidden
    assert inputs.kept
    inputs.release(1)
    assert not inputs.kept


def test_a_layer_that_writes_into_its_input_gets_copies():
    inputs = KeptInputs()
    for _ in range(2):
        hidden = torch.ones(1, 1, 4)
        kept = inputs.keep(1, hidden)
        hidden[..., 0] = 5.0
        inputs.release(1)
        assert torch.equal(kept, torch.ones(1, 1, 4))


def test_inputs_without_a_version_are_copied():
    with torch.inference_mode():
        hidden = torch.ones(1, 1, 4)
        inputs = KeptInputs()
        for _ in range(2):
            assert inputs.keep(1, hidden) is not hidden
            inputs.release(1)


@pytest.mark.parametrize("prefetch", ["correct", "predict"])
def test_a_step_leaves_nothing_behind(device, prefetch):
    model = random_llama(device=device)
    runtime = offloaded(model, budget=24, prefetch=prefetch)
    runtime.calibration = identity_calibration(model)
    logits_of(runtime.generate, random_ids(200, device=device), 4)
    inputs = runtime._session.prefetcher.inputs
    assert inputs.unwritten == runtime._session.prefetcher.predicted_layers
    assert inputs.unwritten
    assert not inputs.kept
    assert not inputs.watched
