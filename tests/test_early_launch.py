"""Kernels that start early compute what they compute in turn, and only GPUs that can do it are asked."""

import pytest
import torch

from offload_runtime.kernels import early_launch
from offload_runtime.kernels.gated import gated_triton
from offload_runtime.kernels.products import products_triton
from offload_runtime.kernels.rms_norm import rms_norm_triton

from .models import logits_of, offloaded, random_ids, random_llama

LAYERS, WIDTH, INNER = 8, 1024, 4096


def test_nothing_starts_early_without_a_gpu():
    x = torch.zeros(1)
    assert early_launch.early_launch(x) == early_launch.launch_in_turn(x) == {"EARLY": False}


@pytest.mark.gpu
def test_an_older_gpu_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    early_launch._has_early_launch.cache_clear()
    try:
        assert early_launch.early_launch(torch.zeros(1, device="cuda")) == {"EARLY": False}
    finally:
        early_launch._has_early_launch.cache_clear()


def chain(x: torch.Tensor, norm: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """MLPs one after the other: each kernel reads what the one ahead of it wrote, into memory used before."""
    for i in range(0, len(weights), 3):
        gate, up, down = weights[i : i + 3]
        opened = gated_triton(rms_norm_triton(x, norm, 1e-5), gate, up, None, None, "silu")
        x = products_triton(opened, [down], [None], x)[0]
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_chain_of_kernels_in_a_graph(monkeypatch, tokens):
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    sizes = [(INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)] * LAYERS
    weights = [torch.randn(size, **options) / size[1] ** 0.5 for size in sizes]
    norm, given = torch.ones(WIDTH, **options), torch.empty(tokens, 1, WIDTH, **options)
    inputs = torch.randn(50, *given.shape, **options)
    monkeypatch.setattr(early_launch, "_has_early_launch", lambda device: False)
    expected = [chain(x, norm, weights) for x in inputs]
    monkeypatch.undo()
    chain(given, norm, weights)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(given, norm, weights)
    for x, right in zip(inputs, expected, strict=True):
        given.copy_(x)
        graph.replay()
        assert torch.equal(out, right)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", ["predict", "correct", "off"])
@pytest.mark.parametrize("new_rows", ["none", 8])
def test_a_decode_step(monkeypatch, prefetch, new_rows):
    model = random_llama(device="cuda", layers=4, dtype=torch.bfloat16)
    ids, settings = random_ids(500, 2, device="cuda"), {"budget": 64, "slots": 160, "new_rows": new_rows}
    runs = []
    for early in (False, True):
        with monkeypatch.context() as patch:
            if not early:
                patch.setattr(early_launch, "_has_early_launch", lambda device: False)
            runtime = offloaded(model, prefetch=prefetch, cuda_graph=True, **settings)
            runs += [logits_of(runtime.generate, ids, 40)[1] for _ in range(2)]
    assert all(torch.equal(run, runs[0]) for run in runs)
