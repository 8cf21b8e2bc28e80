"""The first half of a gated MLP in one launch: act(gate(x)) * up(x), with transformers' roundings.

Both products and what is done with them: 97 us as three kernels, of which the bytes
take 80 (Llama-3.1-8B shape, H100, profile of a decode step).
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from .compile_options import FUSED
from .products import Tile, meta, row_sums, tiles

ACTIVATIONS = ("silu", "gelu_tanh")


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")


def gated_reference(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """act(x gate^T) * (x up^T) [..., F]; x [..., E], gate and up [F, E], biases [F]."""
    opened = activate(functional.linear(x, gate, gate_bias), activation)
    return opened * functional.linear(x, up, up_bias)


def gated_triton(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """gated_reference in one launch, for at most products.MOST_TOKENS tokens; weights contiguous."""
    x = x.contiguous()
    tokens, rows = x.numel() // x.shape[-1], gate.shape[0]
    tile = tile or tiles(tokens)[0]
    out = x.new_empty(*x.shape[:-1], rows)
    _gated_kernel[(triton.cdiv(rows, tile.rows),)](
        x, gate, up, gate_bias, up_bias, out, rows, tokens,
        SILU=activation == "silu", **meta(x, tokens, tile), **FUSED,
    )  # fmt: skip
    return out


@triton.jit
def _gated_kernel(
    x, gate, up, gate_bias, up_bias, out, rows, tokens, SILU: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS_PAD: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    b_gate = row_sums(x, gate, first, rows, tokens, WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)
    b_up = row_sums(x, up, first, rows, tokens, WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)
    o_t, o_n = tl.arange(0, TOKENS_PAD), first + tl.arange(0, ROWS)
    if gate_bias is not None:
        b_gate += tl.load(gate_bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[None, :]
    if up_bias is not None:
        b_up += tl.load(up_bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[None, :]
    b_gate = b_gate.to(out.dtype.element_ty).to(tl.float32)
    b_up = b_up.to(out.dtype.element_ty).to(tl.float32)
    if SILU:
        opened = b_gate * tl.sigmoid(b_gate)
    else:  # tanh(z) = 2 sigmoid(2 z) - 1, so 0.5 (1 + tanh(z)) = sigmoid(2 z); 1.5957... = 2 sqrt(2 / pi)
        opened = b_gate * tl.sigmoid(1.5957691216057308 * (b_gate + 0.044715 * b_gate * b_gate * b_gate))
    opened = opened.to(out.dtype.element_ty).to(tl.float32)
    mask = (o_t < tokens)[:, None] & (o_n < rows)[None, :]
    place = o_t[:, None] * rows + o_n[None, :]  # [T padded, ROWS]
    tl.store(out + place, (opened * b_up).to(out.dtype.element_ty), mask=mask)


def gated(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    activation: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """gated_reference, in one launch on a GPU."""
    if x.is_cuda:
        return gated_triton(x, gate, up, gate_bias, up_bias, activation, tile)
    return gated_reference(x, gate, up, gate_bias, up_bias, activation)
