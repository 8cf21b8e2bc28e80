"""What a layer changes in the next one's input, guessed: the regression, who gets a guess, who uses it."""

from dataclasses import replace

import pytest
import torch

from offload_runtime import calibration_guess
from offload_runtime.adapter import ModelAdapter
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_collect import calibrate_prompt
from offload_runtime.calibration_guess import (
    Regression,
    guess_units,
    keep_better,
    measure_recalls,
    query_metric,
    stacked,
    turns_of,
    watch,
    with_guesses,
)
from offload_runtime.input_guess import Guesses, InputCorrection

from .models import (
    check_predictions_matter_to_predict_only,
    identity_calibration,
    offloaded,
    random_ids,
    random_llama,
)

CPU = torch.device("cpu")


def guessed(parts, known: torch.Tensor) -> torch.Tensor:
    offset, down, up = parts
    return known + offset + known @ down.T @ up.T


def some_guesses(layers: int, width: int, rank: int = 4) -> Guesses:
    draw = torch.Generator().manual_seed(1)
    shapes = ((layers, width), (layers, rank, width), (layers, width, rank))
    offset, down, up = (torch.randn(shape, generator=draw) * 0.3 for shape in shapes)
    up[0] = down[0] = offset[0] = 0
    return Guesses(offset, down, up)


class Doubled(torch.nn.Module):
    """A projection that is no plain linear layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear, self.out_features = linear, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(x)


def test_a_guess_is_the_best_of_its_rank():
    """What is missing is affine of rank 3 here: rank 3 finds it all, a smaller one less."""
    torch.manual_seed(0)
    known = torch.randn(400, 24) + torch.randn(24)
    missing = known @ (torch.randn(24, 3) @ torch.randn(3, 24)) + torch.randn(24)
    fitted = Regression.of(known[:200], known[:200] + missing[:200])
    fitted.add(Regression.of(known[200:], known[200:] + missing[200:]))
    unit = torch.eye(24)
    errors = {
        rank: float((guessed(fitted.solve(rank, unit, CPU), known) - known - missing).norm())
        for rank in (1, 2, 3, 24)
    }
    assert errors[1] > errors[2] > 10 * errors[3]
    assert errors[3] < 0.02 * float(missing.norm())
    torch.testing.assert_close(errors[3], errors[24], rtol=0.05, atol=1e-3)


def test_the_rank_goes_where_the_metric_looks():
    """Of two things missing, the smaller one is what the query sees."""
    torch.manual_seed(0)
    known = torch.randn(400, 16)
    missing = torch.zeros(400, 16)
    missing[:, 0], missing[:, 1] = 10 * known[:, 2], known[:, 3]
    fitted = Regression.of(known, known + missing)
    metric = torch.eye(16) * 1e-6
    metric[1, 1] = 1.0
    found = guessed(fitted.solve(1, metric, CPU), known) - known
    torch.testing.assert_close(found[:, 1], missing[:, 1], rtol=0.05, atol=0.05)
    plain = guessed(fitted.solve(1, torch.eye(16), CPU), known) - known
    torch.testing.assert_close(plain[:, 0], missing[:, 0], rtol=0.05, atol=0.05)
    assert float(plain[:, 1].abs().max()) < 0.2


def test_the_metric_is_the_query_projections_where_it_can_be_read():
    adapter = ModelAdapter(random_llama())
    width = adapter.shape.hidden
    weights = adapter.attentions[1].q_proj.weight.detach()
    error = torch.randn(width)
    seen = float(error @ query_metric(adapter, 1, width) @ error)
    expected = float((weights @ error).square().sum())
    assert expected < seen < 1.01 * expected + 1e-2 * float(error.square().sum())
    adapter.attentions[1].q_proj = torch.nn.Identity()  # as where queries come from a fused projection
    assert torch.equal(query_metric(adapter, 1, width), torch.eye(width))


def test_the_own_input_predicts_all():
    """Corrected to the layer's true input, a prediction is the query itself."""
    adapter, ids = ModelAdapter(random_llama()), random_ids(200)[0]
    inputs: dict[int, torch.Tensor] = {}
    watch(adapter, ids, lambda index, hidden, *_: inputs.__setitem__(index, hidden.clone()), lambda *_: None)

    class Known(InputCorrection):
        def shift_input(self, index, hidden):
            return inputs[index][None]

    kinds = {"true": Known, "before": InputCorrection}
    corrections = {name: kind(None, None, torch.float32, CPU) for name, kind in kinds.items()}
    recalls = measure_recalls(adapter, ids, corrections)
    assert [layer["true"] for layer in recalls.values()] == [1.0, 1.0]
    assert all(layer["before"] < 1 for layer in recalls.values())


def test_a_calibration_gets_guesses_that_help(tmp_path):
    """Layers of a random model add little that is foreseeable; this one's always add the same direction."""
    model = random_llama()
    width = model.config.hidden_size
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 0.1
        layer.register_forward_hook(lambda module, arguments, out: out + torch.linspace(-1, 1, width))
    adapter = ModelAdapter(model)
    blocks = [random_ids(400, seed=seed)[0] for seed in range(3)]
    made = calibrate_prompt(adapter, blocks[0], 16, positions=4096)
    seen: list[int] = []
    better = with_guesses(made, adapter, blocks, seen.append)
    assert seen == list(range(1, 3 * 3 + 1))
    assert guess_units(adapter, len(blocks)) == len(seen)
    assert better.guesses.layers
    assert 0 not in better.guesses.layers
    before, after = (c.provenance["prediction_recall"].split(",") for c in (made, better))
    for index in better.guesses.layers:
        assert (float(after[index]) < 0.5) == (index in better.unpredicted_layers)
    assert before != after
    assert torch.equal(better.key_map, made.key_map)
    better.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    for name in ("offset", "down", "up"):
        torch.testing.assert_close(
            getattr(loaded.guesses, name), getattr(better.guesses, name), rtol=0.01, atol=1e-4
        )


def test_moments_of_many_layers_are_taken_in_turns(monkeypatch):
    """In one turn or layer by layer, the calibration is the same."""
    adapter = ModelAdapter(random_llama())
    blocks = [random_ids(300, seed=seed)[0] for seed in range(2)]
    made = calibrate_prompt(adapter, blocks[0], 16, positions=4096)
    monkeypatch.setattr(calibration_guess, "keep_better", lambda made, guesses, recalls: guesses)
    whole = with_guesses(made, adapter, blocks, lambda _: None)
    monkeypatch.setattr(calibration_guess, "MOMENT_BYTES", 1)
    assert turns_of(3, adapter.shape.hidden) == [range(1, 2), range(2, 3)]
    parts = with_guesses(made, adapter, blocks, lambda _: None)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("offset", "down", "up"))


def test_one_block_guesses_nothing():
    adapter = ModelAdapter(random_llama())
    made = calibrate_prompt(adapter, random_ids(300)[0], 16, positions=4096)
    assert with_guesses(made, adapter, [random_ids(300)[0]], lambda _: None) is made
    assert guess_units(adapter, 1) == 0


def test_only_guesses_that_help_are_kept_and_their_shifts_go():
    model = random_llama()
    shift = torch.ones(3, model.config.hidden_size)
    shift[0] = 0
    made = replace(
        identity_calibration(model),
        input_shift=shift,
        unpredicted_layers=(0, 1, 2),
        provenance={"prediction_recall": "0.000,0.300,0.400"},
    )
    guesses = some_guesses(3, model.config.hidden_size)
    found = keep_better(made, guesses, {1: {"plain": 0.3, "guess": 0.8}, 2: {"plain": 0.4, "guess": 0.4}})
    assert found.guesses.layers == {1}
    assert found.input_shift.any(-1).tolist() == [False, False, True]
    assert found.unpredicted_layers == (0, 2)
    assert found.provenance["prediction_recall"] == "0.000,0.800,0.400"
    assert keep_better(made, guesses, {1: {"plain": 0.3, "guess": 0.2}}) is made


def test_layers_without_parts_are_zero():
    parts = (torch.ones(8), torch.ones(2, 8), torch.ones(8, 2))
    guesses = stacked({2: parts}, 3)
    assert guesses.layers == {2}
    assert guesses.rank == 2
    assert guesses.offset.shape == (3, 8)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_guess_of_a_few_tokens_and_of_many(device, tokens):
    guesses = some_guesses(3, 96, rank=24)
    correction = InputCorrection(None, guesses, torch.float32, torch.device(device))
    rows = torch.randn(tokens, 1, 96)
    expected = guessed((guesses.offset[2], guesses.down[2], guesses.up[2]), rows)
    torch.testing.assert_close(correction.guess(2, rows.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_a_guess_goes_through_its_layers_projection(device, tokens, bias):
    """Carried through the projection, it gives the query that the projection makes of the guess."""
    guesses, linear = some_guesses(3, 96, rank=24), torch.nn.Linear(96, 160, bias=bias)
    plain = InputCorrection(None, guesses, torch.float32, CPU)
    rows = torch.randn(tokens, 1, 96)
    expected = linear(plain.guess(2, rows))
    linear = linear.to(device)
    carried = InputCorrection(None, guesses, torch.float32, torch.device(device), {0: linear, 2: linear})
    rows = rows.to(device)
    assert set(carried.projections) == {2}  # layer 0 has no guess
    assert torch.equal(carried.guess(2, rows), rows)
    assert not torch.equal(carried.guess(1, rows), rows)
    torch.testing.assert_close(carried.project(2, rows).cpu(), expected, rtol=1e-4, atol=1e-4)
    other = some_guesses(3, 96, rank=24)
    other.up.mul_(2)
    carried.set(None, other)
    plain.set(None, other)
    expected = linear(plain.guess(2, rows.cpu()).to(device))
    torch.testing.assert_close(carried.project(2, rows), expected, rtol=1e-4, atol=1e-4)


def test_a_correction_takes_other_values_for_the_same_layers_only():
    guesses = some_guesses(3, 8)
    correction = InputCorrection(None, guesses, torch.float32, CPU)
    other = some_guesses(3, 8)
    other.up.mul_(2)
    assert correction.accepts(None, other)
    correction.set(None, other)
    rows = torch.randn(2, 1, 8)
    expected = rows + other.offset[1] + rows @ other.down[1].T @ other.up[1].T
    torch.testing.assert_close(correction.guess(1, rows), expected)
    assert torch.equal(correction.guess(0, rows), rows)
    assert not correction.accepts(None, some_guesses(3, 8, rank=2))
    assert not correction.accepts(torch.ones(3, 8), guesses)
    assert not correction.accepts(None, None)
    assert InputCorrection(None, None, torch.float32, CPU).accepts(None, None)


def test_layers_that_are_not_predicted_get_no_corrections():
    guesses, shift = some_guesses(3, 8), torch.ones(3, 8)
    some = InputCorrection(shift, guesses, torch.float32, CPU, predicted=frozenset({1}))
    rows = torch.randn(2, 1, 8)
    assert set(some.parts) == {1}
    assert torch.equal(some.shift_input(2, rows), rows)
    assert not torch.equal(some.shift_input(1, rows), rows)
    assert some.accepts(shift, guesses)
    assert not some.accepts(None, guesses)
    none = InputCorrection(shift, guesses, torch.float32, CPU, predicted=frozenset())
    assert none.shift is None
    assert none.parts == {}
    assert none.accepts(None, None)
    none.set(shift, guesses)
    assert none.parts == {}


@pytest.mark.parametrize("mode", ["correct", "predict"])
@pytest.mark.parametrize("plain_projection", [True, False])
def test_predictions_start_from_the_guess(mode, plain_projection, monkeypatch):
    """Through the query's projection, or before it where another module than a linear layer makes queries."""
    model, ids = random_llama(), random_ids(120)
    if not plain_projection:
        for layer in model.model.layers:
            layer.self_attn.q_proj = Doubled(layer.self_attn.q_proj)
    guesses = some_guesses(3, model.config.hidden_size)
    runtime = offloaded(model, budget=24, prefetch=mode)
    runtime.calibration = replace(identity_calibration(model), guesses=guesses)
    runtime.generate(ids, max_new_tokens=2, do_sample=False)
    given: dict[int, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    norms = [layer.input_layernorm for layer in model.model.layers]
    name = "project" if plain_projection else "guess"
    corrected = getattr(InputCorrection, name)

    def watched(self, index, normed):
        given[index] = normed
        out = corrected(self, index, normed)
        expected = guessed((guesses.offset[index], guesses.down[index], guesses.up[index]), normed)
        if plain_projection:
            expected = torch.nn.functional.linear(expected, model.model.layers[index].self_attn.q_proj.weight)
        torch.testing.assert_close(out, expected)
        return out

    monkeypatch.setattr(InputCorrection, name, watched)
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, i=index: inputs.__setitem__(i, arguments[0]))
        for index, layer in enumerate(model.model.layers)
    ]
    runtime._session.step(torch.tensor([5]))
    for hook in hooks:
        hook.remove()
    assert sorted(given) == [1, 2]
    for index, normed in given.items():
        torch.testing.assert_close(normed, norms[index](inputs[index - 1]))


def test_a_guess_changes_no_bit_of_correct(device):
    model, ids = random_llama(device=device), random_ids(300, device=device)
    calibration = replace(identity_calibration(model), guesses=some_guesses(3, model.config.hidden_size))
    check_predictions_matter_to_predict_only(model, ids, calibration)
