"""A decode step's products in fewer launches: the same numbers, and only where nothing else is in the way."""

from functools import partial

import pytest
import torch
from torch import nn

from offload_runtime import decode, product_trial, products
from offload_runtime.adapter import AttentionCall, ModelAdapter
from offload_runtime.fusion import Fusion
from offload_runtime.kernels.gated import gated_triton
from offload_runtime.kernels.products import products_reference, products_triton, tiles
from offload_runtime.products import Joined, joint_products, plain_linears
from offload_runtime.residuals import added

from .architectures import FAMILIES, random_model
from .models import logits_of, offloaded, random_ids, random_llama

LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "mlp", "down_proj"}
PLAIN_LAYERS = {"llama3 rope", "qwen2, biases", "mixtral", "phi3"}  # granite scales, gemma2 norms again
FUSED = {
    "llama3 rope": LLAMA,
    "qwen2, biases": LLAMA,
    "gemma2": LLAMA,  # GELU
    "granite": LLAMA,
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"o_proj"},  # its weights are joined already
}


def names_of(model, pairs):
    """Last names of the modules with another forward."""
    names = {module: name for name, module in model.named_modules()}
    return [names[module].rpartition(".")[2] for module, _ in pairs]


def step(model, adapter, ids):
    """Logits of one token a sequence, every attention just handing its values on."""

    def handle(call: AttentionCall) -> torch.Tensor:
        out = call.query + call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
        return out.transpose(1, 2)

    with torch.no_grad(), adapter.handled_by([handle] * len(adapter.layers)):
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_and_that_it_computes_the_same(name):
    model = random_model(name)
    adapter, ids = ModelAdapter(model), random_ids(1, batch=2)
    fusion = Fusion(adapter, tokens=2, products=True)
    found = names_of(model, fusion.products)
    assert set(found) == FUSED[name]
    assert len(found) == len(FUSED[name]) * len(adapter.layers)
    assert len(fusion.layers) == len(adapter.layers) * (name in PLAIN_LAYERS)
    expected = step(model, adapter, ids)
    with fusion.applied():
        assert torch.equal(step(model, adapter, ids), expected)
        other = random_ids(1, batch=3)  # not the number of tokens that it was made for
        as_fused = step(model, adapter, other)
    assert torch.equal(step(model, adapter, other), as_fused)
    assert all("forward" not in vars(module) for module, _ in fusion.products + fusion.layers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter, which runs without a GPU only")
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_in_a_model(monkeypatch, batch):
    monkeypatch.setattr(products, "products", products_triton)
    monkeypatch.setattr(products, "gated", gated_triton)
    monkeypatch.setattr(product_trial, "choices", dict)  # nothing tried before
    model = random_model("qwen2, biases")
    adapter, ids = ModelAdapter(model), random_ids(1, batch=batch)
    expected = step(model, adapter, ids)
    with Fusion(adapter, batch, products=True).applied():
        got = step(model, adapter, ids)
    assert not torch.equal(got, expected)  # other sums: the kernels did run
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def forced(monkeypatch):
    """Decode loops fuse products wherever they can, on a CPU too."""
    monkeypatch.setattr(decode, "Fusion", partial(Fusion, products=True))


@pytest.mark.parametrize("name", ["llama3 rope", "qwen2, biases", "gemma2", "mixtral"])
def test_tokens_and_prefetch_modes_are_what_they_were(forced, name):
    model, ids = random_model(name), random_ids(90)
    settings = {"budget": 12, "slots": 16}
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(decode, "Fusion", partial(Fusion, products=False))
        _, expected = logits_of(offloaded(model, **settings).generate, ids, 6)
    for prefetch in ("off", "correct"):
        runtime = offloaded(model, prefetch=prefetch, audit_every=3, **settings)
        for _ in range(2):
            assert torch.equal(logits_of(runtime.generate, ids, 6)[1], expected)
        assert runtime._session.decoder.fusion.products


def test_one_launch_makes_q_k_and_v_and_a_prediction_only_q(monkeypatch):
    launches = []

    def counted(x, weights, *rest, **options):
        launches.append(len(weights))
        return products_reference(x, weights, *rest[:2])

    model = random_llama(layers=2)
    adapter, ids = ModelAdapter(model), random_ids(1)
    fusion = Fusion(adapter, 1, products=True)
    assert fusion.products  # its trials make products too
    monkeypatch.setattr(products, "products", counted)
    with fusion.applied():
        step(model, adapter, ids)
    assert launches == [3, 1, 1] * 2  # q k v, o, down; gate and up by another kernel
    launches.clear()
    hidden = torch.randn(1, 1, model.config.hidden_size)
    position = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long))
    keywords = {"position_embeddings": position, "attention_mask": None}
    handlers = [lambda call: call.query.transpose(1, 2)] * 2
    with torch.no_grad(), adapter.handled_by(handlers):
        expected, _ = adapter.predicted_query(1, hidden, keywords)
        with fusion.applied():
            got, _ = adapter.predicted_query(1, hidden, keywords)
            assert torch.equal(step(model, adapter, ids), step(model, adapter, ids))
    assert torch.equal(got, expected)
    assert launches == [1, *[3, 1, 1] * 4]


def test_another_input_gets_its_own_product():
    parts = [nn.Linear(8, 4), nn.Linear(8, 6)]
    joined = Joined(parts, 1, None)
    first, second = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    forwards = [forward for _, forward in joined.forwards()]
    with torch.no_grad():
        assert torch.equal(forwards[0](first), parts[0](first))
        assert torch.equal(forwards[1](second), parts[1](second))  # not what the first call left
        assert torch.equal(forwards[0](second), parts[0](second))
        assert joined.source is None
        assert torch.equal(forwards[1](first), parts[1](first))
        assert torch.equal(forwards[1](first), parts[1](first))  # called twice


class Adapted(nn.Linear):
    """As LoRA does it: another class."""


def spoiled(kind, model):
    """Change layer 0's q_proj and up_proj."""
    layer = model.model.layers[0]
    for owner, name in ((layer.self_attn, "q_proj"), (layer.mlp, "up_proj")):
        part = getattr(owner, name)
        if kind == "hook":
            part.register_forward_hook(lambda *_: None)
        elif kind == "class":
            setattr(owner, name, Adapted(part.in_features, part.out_features, bias=False))
        elif kind == "forward":
            part.forward = part.forward
        else:
            part.weight = nn.Parameter(part.weight.double())


@pytest.mark.parametrize("kind", ["hook", "class", "forward", "type"])
def test_anything_unusual_stays_as_it_is(kind):
    model = random_llama(layers=2)
    spoiled(kind, model)
    fusion = Fusion(ModelAdapter(model), 1, products=True, residuals=False)
    fused = {module for module, _ in fusion.products}
    first, second = (model.model.layers[i] for i in (0, 1))
    assert not fused & {first.self_attn.q_proj, first.self_attn.k_proj, first.mlp}
    assert {second.self_attn.q_proj, second.self_attn.k_proj, second.mlp} <= fused


def test_an_mlp_that_computes_something_else_stays(monkeypatch):
    model = random_llama(layers=1)
    mlp = model.model.layers[0].mlp
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    fused = {module for module, _ in Fusion(ModelAdapter(model), 1, products=True).products}
    assert mlp not in fused


def test_a_layer_that_computes_something_else_keeps_its_residuals(monkeypatch):
    model = random_llama(layers=2)
    attention = model.model.layers[0].self_attn
    plain = attention.forward
    attention.forward = lambda *arguments, **keywords: (plain(*arguments, **keywords)[0] * 1.0, None)
    fusion = Fusion(ModelAdapter(model), 1, products=True)
    assert [layer for layer, _ in fusion.layers] == [model.model.layers[1]]
    assert not Fusion(ModelAdapter(model), 1, products=True, residuals=False).layers


def test_a_residual_that_no_product_took_is_added():
    last, half = Joined([nn.Linear(4, 4)], 1, None), torch.randn(2, 1, 4)
    residual = torch.randn(2, 1, 4)
    assert torch.equal(added(last, residual, lambda: half), residual + half)
    assert last.residual is None


def test_one_trial_a_process(monkeypatch):
    known, tried = {}, []
    monkeypatch.setattr(product_trial, "choices", lambda: known)
    monkeypatch.setattr(product_trial, "trial", lambda work, sites, tokens: tried.append(tokens))
    model = random_llama(layers=2)
    for _ in range(2):
        assert not Fusion(ModelAdapter(model), 1, products=True).products
    assert len(tried) == 4  # q k v, gate and up, down, o


def test_a_kernel_that_disagrees_is_not_taken():
    def work(linears, x, tile):
        return [linears[0](x) + (tile is not None)]

    with torch.no_grad():
        assert product_trial.trial(work, [[nn.Linear(8, 4)]], 1) is None


def test_the_usual_tile_unless_another_is_clearly_faster():
    usual, other = tiles(1)
    assert product_trial.fastest({usual: 1.0, other: 0.97, None: 0.98}) == usual
    assert product_trial.fastest({usual: 1.0, other: 0.90, None: 0.93}) == other
    assert product_trial.fastest({usual: 1.0, other: 0.90, None: 0.80}) is None


def test_every_family_can_be_looked_at():
    for name in FAMILIES:
        _ = Fusion(ModelAdapter(random_model(name)), 1, products=True).for_steps


def test_layers_of_two_widths_are_not_joined():
    module = nn.Module()
    module.q_proj, module.k_proj = nn.Linear(8, 4), nn.Linear(6, 4)
    assert plain_linears(module, ("q_proj", "k_proj")) == []
    assert plain_linears(module, ("q_proj", "v_proj")) == []


@pytest.fixture
def tiles_win(monkeypatch):
    """On a GPU, where tiny products are timed, the first tile is always taken."""
    monkeypatch.setattr(product_trial, "choices", dict)
    monkeypatch.setattr(product_trial, "time_ms", lambda work, sites, x, tile: float(tile is None))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_bits_on_a_gpu_do_not_depend_on_prefetch_or_graph(tiles_win, batch):
    model, ids = (
        random_llama(device="cuda", layers=4, dtype=torch.bfloat16),
        random_ids(500, batch, device="cuda"),
    )
    runs = []
    for prefetch, cuda_graph in (("off", False), ("off", True), ("correct", False), ("correct", True)):
        runtime = offloaded(model, budget=24, slots=40, prefetch=prefetch, cuda_graph=cuda_graph)
        for _ in range(2):
            runs.append(logits_of(runtime.generate, ids, 12)[1])
        fusion = runtime._session.decoder.fusion
        assert set(names_of(model, fusion.products)) == LLAMA
        assert len(fusion.layers) == 4
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("batch", [1, 4])
def test_kernels_in_models_on_a_gpu(tiles_win, name, batch):
    """The yardstick is bfloat16's own noise: the same step in float32."""
    model = random_model(name, "cuda")
    ids = random_ids(1, batch, device="cuda")
    exact = step(model, ModelAdapter(model), ids)
    adapter = ModelAdapter(model.bfloat16())
    plain = step(model, adapter, ids).float()
    fusion = Fusion(adapter, batch)
    assert set(names_of(model, fusion.products)) == FUSED[name]
    with fusion.applied():
        fused = step(model, adapter, ids).float()
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.gpu
def test_the_trial_of_a_real_shape_ends(monkeypatch):
    monkeypatch.setattr(product_trial, "choices", dict)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    sites = [[nn.Linear(1024, n, bias=False, **kind) for n in (1024, 256, 256)]] * 2
    x = torch.randn(1, 1, 1024, **kind)
    with torch.no_grad():
        for tile in (None, tiles(1)[0]):
            assert 0 < product_trial.time_ms(joint_products, sites, x, tile) < 5
        assert product_trial.choose_tile("test", joint_products, sites, 1) in (None, *tiles(1))
