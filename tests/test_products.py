"""Kernels of a decode step's matrix products against their references."""

import pytest
import torch

from offload_runtime.kernels.gated import ACTIVATIONS, gated_reference, gated_triton
from offload_runtime.kernels.products import products_reference, products_triton, tiles

SHAPES = [(1, 1), (2, 1), (3, 5), (16, 1)]  # batch, tokens
WIDTHS = [4, 48, 320]  # less than a matrix unit takes, less than a block, and no multiple of one


def close(ours, theirs, rounded=1):
    """Sums are made in another order, so each number that is rounded on the way may be one step off."""
    tolerance = 1e-5 if ours.dtype == torch.float32 else 2 * rounded * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def drawn(device, dtype, width, *rows):
    """Weights [N, E] scaled so that products are of size 1."""
    return [torch.randn(n, width, device=device).div(width**0.5).to(dtype) for n in rows]


@pytest.mark.parametrize(("batch", "tokens"), SHAPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_one_input(poisoned, device, batch, tokens, width, dtype):
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, width, device=device).to(dtype)
    weights = drawn(device, dtype, width, 72, 24, 9)  # one does not fill its last tile
    biases = [torch.randn(72, device=device).to(dtype), None, torch.randn(9, device=device).to(dtype)]
    for count in (1, 3):
        ours = products_triton(x, weights[:count], biases[:count])
        theirs = products_reference(x, weights[:count], biases[:count])
        for got, expected in zip(ours, theirs, strict=True):
            assert got.is_contiguous()
            close(got, expected)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_added_to_a_residual(poisoned, device, batch, dtype):
    torch.manual_seed(0)
    x, residual = (torch.randn(batch, 1, n, device=device).to(dtype) for n in (320, 48))
    weights = drawn(device, dtype, 320, 48)
    ours = products_triton(x, weights, [None], residual)
    close(ours[0], products_reference(x, weights, [None], residual)[0])


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated(poisoned, device, batch, activation, has_bias, dtype):
    torch.manual_seed(0)
    x = torch.randn(batch, 1, 320, device=device).to(dtype)
    gate, up = drawn(device, dtype, 320, 57, 57)
    biases = [torch.randn(57, device=device).to(dtype) if has_bias else None for _ in range(2)]
    ours = gated_triton(x, gate, up, *biases, activation)
    close(ours, gated_reference(x, gate, up, *biases, activation), rounded=3)


@pytest.mark.parametrize("tokens", [1, 8])
def test_tiles_differ_by_roundings_only(device, tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, 1, 2112, device=device).bfloat16()
    weights = drawn(device, torch.bfloat16, 2112, 40, 8)
    gate = gated_reference(x, weights[0], weights[0], None, None, "silu")
    for tile in tiles(tokens):
        for got, expected in zip(
            products_triton(x, weights, [None, None], tile=tile),
            products_reference(x, weights, [None, None]),
            strict=True,
        ):
            close(got, expected)
        close(gated_triton(x, weights[0], weights[0], None, None, "silu", tile), gate, rounded=3)


def test_too_many_tokens_have_no_tile():
    assert tiles(17) == ()
