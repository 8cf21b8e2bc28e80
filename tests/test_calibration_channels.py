"""Published channel files, and channels chosen greedily against trying every set."""

import itertools
import json

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from offload_runtime import OffloadedModel
from offload_runtime.calibrate_command import calibrate
from offload_runtime.calibration import Calibration, calibrate_layer
from offload_runtime.calibration_maps import LayerMoments, greedy_maps
from offload_runtime.cli import app
from offload_runtime.errors import UserError

from .test_calibration import approximate, model_directory, skewed, text_file  # noqa: F401

LAYERS, HEADS, KV_HEADS, DIM = 3, 4, 2, 32


def orders(heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(DIM, generator=generator).tolist() for _ in range(heads)]


@pytest.fixture
def published(tmp_path):
    """A file as the Double Sparsity repository has them, for the model of model_directory."""
    content = {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn"
        content[f"{name}.q_proj"] = orders(HEADS, layer)
        content[f"{name}.k_proj"] = orders(KV_HEADS, layer + 10)
        content[f"{name}.qk_proj"] = orders(HEADS, layer + 20)
    file = tmp_path / "channels.json"
    file.write_text(json.dumps(content))
    return file


def test_published_channels_of_kv_heads(model_directory, published, tmp_path):  # noqa: F811
    out = tmp_path / "c.safetensors"
    calibrate(model_directory, method="channels-k", channels=4, out=out, channels_from=published)
    made = Calibration.load(out)
    for layer in range(LAYERS):
        first = [sorted(order[:4]) for order in orders(KV_HEADS, layer + 10)]
        assert made.key_map[layer].argmax(-1).tolist() == first
    assert torch.equal(made.query_map, made.key_map.repeat_interleave(2, 1))
    assert made.unpredicted_layers == (0,)
    assert made.provenance["channels_from"] == "channels.json"
    made.check(AutoConfig.from_pretrained(model_directory))


def test_query_heads_that_share_a_kv_head_agree_by_mean_rank(model_directory, published, tmp_path):  # noqa: F811
    content = json.loads(published.read_text())
    shared = [[5, 7, 1], [7, 9, 5]]  # mean ranks: 7 has 0.5, 5 has 1, 9 and 1 more
    lists = [order + [c for c in range(DIM) if c not in order] for order in shared]
    content["model.layers.1.self_attn.qk_proj"][:2] = lists
    published.write_text(json.dumps(content))
    out = tmp_path / "c.safetensors"
    calibrate(model_directory, method="channels", channels=2, out=out, channels_from=published)
    assert Calibration.load(out).key_map[1, 0].argmax(-1).tolist() == [5, 7]


def test_a_text_tells_which_layers_to_predict(model_directory, published, text_file, tmp_path):  # noqa: F811
    out, plain = tmp_path / "c.safetensors", tmp_path / "p.safetensors"
    options = {"method": "channels", "channels": 8, "tokens": 300, "device": "cpu"}
    calibrate(model_directory, [text_file], out=plain, **options)
    calibrate(model_directory, [text_file], out=out, channels_from=published, **options)
    made, other = Calibration.load(out), Calibration.load(plain)
    assert made.unpredicted_layers == other.unpredicted_layers
    assert made.provenance["prediction_recall"] == other.provenance["prediction_recall"]
    assert torch.equal(made.mass_curve.held, other.mass_curve.held)
    assert not torch.equal(made.key_map, other.key_map)


def test_command_and_use(model_directory, published, tmp_path):  # noqa: F811
    out = tmp_path / "c.safetensors"
    arguments = ["calibrate", "--model", str(model_directory), "--channels-from", str(published)]
    result = CliRunner().invoke(app, [*arguments, "--channels", "16", "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    model = OffloadedModel.from_pretrained(
        model_directory, device="cpu", calibration=str(out), ctx=200, budget=8
    )
    ids = model.generate(torch.arange(3, 103)[None], max_new_tokens=3, do_sample=False)
    assert ids.shape[1] <= 103


@pytest.mark.parametrize(
    ("change", "method", "words"),
    [
        (lambda c: c.pop("model.layers.2.self_attn.qk_proj"), "channels", "2 layers, this model has 3"),
        (lambda c: c["model.layers.2.self_attn.qk_proj"].pop(), "channels", r"shape \(3, 32\)"),
        (lambda c: c["model.layers.0.self_attn.q_proj"][0].reverse(), "greedy", "needs a text"),
        (lambda c: c["model.layers.0.self_attn.k_proj"].append("x"), "channels-k", "not a list of lists"),
        (lambda c: c["model.layers.0.self_attn.qk_proj"][0].__setitem__(0, 99), "channels", "orders of 32"),
        (lambda c: c.clear(), "channels", "no key like"),
    ],
)
def test_other_files_are_refused(model_directory, published, tmp_path, change, method, words):  # noqa: F811
    content = json.loads(published.read_text())
    change(content)
    published.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        calibrate(model_directory, method=method, channels=4, out=tmp_path / "c", channels_from=published)
    published.write_text("no json")
    with pytest.raises(UserError, match="not JSON"):
        calibrate(model_directory, method="channels", channels=4, out=tmp_path / "c", channels_from=published)


def error_of(moments, chosen):
    """Mean square score error of the channels `chosen` of one KV head, by its definition."""
    mean = moments.key_sum[0] / moments.tokens
    cq, ck = moments.query[0] / (moments.tokens * moments.group), moments.key[0] / moments.tokens
    ck = ck - torch.outer(mean, mean)
    rest = ck - ck[:, chosen] @ torch.linalg.solve(ck[chosen][:, chosen], ck[chosen])
    return float((cq * rest).sum())


def test_greedy_takes_the_best_channel_at_every_step_and_its_error_is_as_computed():
    queries, keys = skewed(2, 400, 8, 1), skewed(1, 400, 8, 2)
    moments = LayerMoments.of(queries, keys)
    mean = moments.key_sum / moments.tokens
    arguments = (moments.query / (moments.tokens * moments.group), moments.key / moments.tokens, mean)
    taken = []
    for channels in range(1, 8):
        query_map, key_map = greedy_maps(*arguments, channels, 2, ridge=0.0)
        chosen = key_map[0].argmax(-1).tolist()
        best = min((c for c in range(8) if c not in taken), key=lambda c: error_of(moments, [*taken, c]))
        assert set(chosen) == {*taken, best}
        taken.append(best)
        centred = keys[0].double() - mean[0]
        wrong = queries.double() @ (centred.T - query_map[0].double().T @ key_map[0].double() @ centred.T)
        # over all pairs of calibration queries and keys, which is what independent draws mean
        torch.testing.assert_close(float(wrong.square().mean()), error_of(moments, chosen), rtol=1e-4, atol=0)


def test_greedy_beats_the_largest_products_and_is_near_the_best_set():
    queries, keys = skewed(1, 500, 8, 3), skewed(1, 500, 8, 4)
    moments = LayerMoments.of(queries, keys)
    greedy = calibrate_layer(queries, keys, 3, "greedy")[1][0].argmax(-1).tolist()
    largest = calibrate_layer(queries, keys, 3, "channels")[1][0].argmax(-1).tolist()
    best = min(error_of(moments, list(s)) for s in itertools.combinations(range(8), 3))
    assert error_of(moments, greedy) <= min(error_of(moments, largest), 1.2 * best)


def test_greedy_to_head_dim_keeps_every_score():
    queries, keys = skewed(4, 200, 16, 1), skewed(2, 200, 16, 2)
    exact = queries.double() @ keys.double().repeat_interleave(2, 0).mT
    got = approximate(queries, keys, calibrate_layer(queries, keys, 16, "greedy"))
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)
