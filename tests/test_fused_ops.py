"""Fused norm and rotary kernels against their references, and where Fusion lets them in."""

import pytest
import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.fusion import Fusion
from offload_runtime.kernels.rms_norm import rms_norm_reference, rms_norm_triton
from offload_runtime.kernels.rotary import rotate_reference, rotate_triton

from .models import random_llama


@pytest.mark.parametrize("width", [96, 384, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(device, width, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, width, device=device).to(dtype), torch.rand(width, device=device).to(dtype)
    ours, theirs = rms_norm_triton(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (7, 1)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 5)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_rotary(device, heads, kv_heads, batch, tokens, dim):
    torch.manual_seed(0)
    # As the attention modules hand them over: [B, T, H, D] seen as [B, H, T, D].
    query = torch.randn(batch, tokens, heads, dim, device=device).transpose(1, 2)
    key = torch.randn(batch, tokens, kv_heads, dim, device=device).transpose(1, 2)
    angle = torch.randn(batch, tokens, dim, device=device)
    ours = rotate_triton(query, key, angle.cos(), angle.sin())
    theirs = rotate_reference(query, key, angle.cos(), angle.sin())
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_fused_on_a_cpu():
    fusion = Fusion(ModelAdapter(random_llama()), 1)
    assert not fusion.norms
    assert fusion.rotary is None
    assert not fusion.products


@pytest.mark.gpu
def test_llama_is_fused_and_restored():
    model = random_llama(device="cuda")
    fusion = Fusion(ModelAdapter(model), 1)
    assert len(fusion.norms) == 2 * model.config.num_hidden_layers + 1
    plain = fusion.rotary.apply_rotary_pos_emb
    with fusion.applied():
        assert fusion.rotary.apply_rotary_pos_emb is not plain
    assert fusion.rotary.apply_rotary_pos_emb is plain
    assert all("forward" not in norm.__dict__ for norm in fusion.norms)
