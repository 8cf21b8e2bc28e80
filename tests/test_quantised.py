"""Quantised weights by transformers' own loaders: decoded as transformers decodes the same packed model."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload_runtime import OffloadedModel
from offload_runtime.adapter import ModelAdapter
from offload_runtime.cli_model import config_of, weights_of
from offload_runtime.engine import choose_device
from offload_runtime.errors import UserError
from offload_runtime.loading import QUANTISERS
from offload_runtime.model_source import ModelSource
from offload_runtime.weights import count_weights, loaded_weights, weight_bytes

from .architectures import random_model
from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama

PROMPT, NEW_TOKENS = 90, 16
# Prefill multiplies 64 tokens at a time and transformers all of them: packed products may round otherwise.
# bitsandbytes' CPU form with AVX-512 multiplies in bfloat16, 0.04 on logits of +-6 (measured).
TOLERANCE = {"bnb-4bit": 0.2, "torchao-int8": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama whose sizes are multiples of 64, as bitsandbytes' blocks want them."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.15, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def needs(name: str) -> None:
    for package in (QUANTISERS[name][0], "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install {package}")


@pytest.fixture(params=QUANTISERS)
def packed(request, folder, device) -> tuple[str, OffloadedModel]:
    needs(request.param)
    settings = {"device": device, "dtype": "float32", "ctx": 4096, "budget": "1/1", "chunk_tokens": 64}
    return request.param, OffloadedModel.from_pretrained(folder, quantize=request.param, **settings)


def test_packed_model_equals_transformers_and_prefetch_changes_nothing(packed, device):
    name, runtime = packed
    model, ids = runtime.model, random_ids(PROMPT, device=device)
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter  # it is packed
    expected_ids, expected = logits_of(model.generate, ids, NEW_TOKENS)
    got_ids, got = logits_of(runtime.generate, ids, NEW_TOKENS)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=TOLERANCE[name])
    if name == "torchao-int8":
        assert torch.equal(got_ids, expected_ids)
    seen = {}
    for mode in ("off", "correct", "predict"):
        sparse = offloaded(model, budget=12, slots=16, prefetch=mode)
        sparse.calibration = identity_calibration(model)
        _, seen[mode] = logits_of(sparse.generate, ids, NEW_TOKENS)
        assert sparse.stats["cuda_graph"] == (device == "cuda")
    assert torch.equal(seen["correct"], seen["off"])
    assert not torch.equal(seen["predict"], seen["off"])


@torch.no_grad()
def test_predicted_query_of_a_packed_layer_is_its_own(packed, device):
    """The layer-ahead query leaves k and v unmultiplied and is the query that attention gets."""
    _, runtime = packed
    adapter, seen = ModelAdapter(runtime.model), []

    def handle(call):
        seen.append(call.query)
        return call.query.transpose(1, 2)

    def observe(index, hidden, keywords):
        if index == 1:
            seen.append(adapter.predicted_query(1, hidden, keywords)[0])

    with adapter.handled_by([handle] * 3), adapter.observed_by(observe):
        adapter.model(random_ids(1, device=device), use_cache=False)
    _, predicted, own, _ = seen
    assert torch.equal(predicted, own)


def test_plan_knows_the_packed_size(packed):
    name, runtime = packed
    planned = count_weights(LlamaConfig(**{**runtime.model.config.to_dict(), "quantization_config": None}))
    size = planned.quantised(QUANTISERS[name][1])
    assert size.bytes_in(torch.float32) == pytest.approx(weight_bytes(runtime.model), rel=0.03)
    loaded = loaded_weights(runtime.model)
    assert loaded.bytes_in(torch.float32) == 0
    assert loaded.unpacked_bytes_in(torch.float32) == 4 * 256 * 128  # of an MLP's matrices
    assert loaded_weights(random_llama()).unpacked_bytes_in(torch.float32) == 0


@pytest.mark.parametrize("name", QUANTISERS)
def test_experts_stay_as_they_are_and_the_plan_knows(name, tmp_path, capsys):
    """Mixtral's experts are one tensor a layer, which neither package packs."""
    needs(name)
    random_model("mixtral", hidden_size=64, head_dim=64).save_pretrained(tmp_path)
    runtime = OffloadedModel.from_pretrained(tmp_path, device="cpu", quantize=name)
    experts = runtime.model.model.layers[0].mlp.experts.gate_up_proj
    assert type(experts) is torch.nn.Parameter
    assert experts.dtype == torch.float32
    source = ModelSource(str(tmp_path), "cpu", None, quantize=name)
    size = weights_of(source, config_of(source))
    assert "leaves this model's experts, " in capsys.readouterr().err
    assert size.bytes_in(torch.float32) == pytest.approx(weight_bytes(runtime.model), rel=0.03)


def test_a_kind_that_transformers_does_not_know(tmp_path):
    """transformers itself warns and takes the packed numbers for weights."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs accelerate: pip install accelerate")
    random_llama(layers=1).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "q9", "bits": 4}}
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match="quantised with 'q9', which this version of transformers"):
        OffloadedModel.from_pretrained(tmp_path, device="cpu")


def test_transformers_own_config_is_passed_on(folder):
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    own = TorchAoConfig(Int8WeightOnlyConfig())
    runtime = OffloadedModel.from_pretrained(folder, device="cpu", quantization_config=own)
    assert weight_bytes(runtime.model) < 0.5 * 4 * sum(p.numel() for p in runtime.model.parameters())
    assert choose_device("cpu") == runtime.model.device
