"""Matrix products of a decode step: few tokens, so that reading the weights is all there is to do.

One launch makes up to three products of one input (queries, keys and values), and
every sum is made within one program. cuBLAS makes them one after the other, each
split over programs whose sums a second kernel adds up: q, k and v then cost 60 us
where their bytes take 20 (Llama-3.1-8B shape, H100, profile of a decode step).
The weights stay where they are. No atomics: the same input gives the same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from .compile_options import FUSED
from .early_launch import early_launch, wait_for_inputs

MOST_MATRICES = 3
LEAST_BLOCK = 16  # inputs that a matrix unit multiplies at once; with fewer the kernel does not compile
MOST_TOKENS = 16  # the smallest tile of the matrix units; beyond it a product is not all reading


class Tile(NamedTuple):
    """What one program reads at a time: `rows` outputs, `block` of each one's inputs."""

    rows: int
    block: int
    num_warps: int
    num_stages: int = 1


# For `offload_runtime/products.py` to choose from by a trial. The first is within 3 % of the fastest of eight
# at every product of the 8B shape (H100, bench/results/products.json).
ONE_TOKEN = (Tile(1, 2048, 4), Tile(4, 1024, 4))
# Through the matrix units, whose operands are loaded some blocks ahead.
FEW_TOKENS = (Tile(16, 256, 4, 4), Tile(32, 128, 4, 4))


def tiles(tokens: int) -> tuple[Tile, ...]:
    """The tiles for so many tokens, the usual one first; none when there are too many."""
    if tokens == 1:
        return ONE_TOKEN
    return FEW_TOKENS if tokens <= MOST_TOKENS else ()


def products_reference(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """x [..., E] times the transpose of each weight [N, E], plus its bias [N]: one [..., N] for each.

    residual [..., N]: added to the (one) product after it is rounded, as a decoder layer does.
    """
    outs = [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return outs if residual is None else [residual + out for out in outs]


def products_triton(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> list[torch.Tensor]:
    """products_reference in one launch, for at most MOST_TOKENS tokens; weights contiguous."""
    assert 1 <= len(weights) <= MOST_MATRICES
    assert residual is None or len(weights) == 1
    x, width = x.contiguous(), x.shape[-1]
    tokens = x.numel() // width
    tile = tile or tiles(tokens)[0]
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    missing = [None] * (MOST_MATRICES - len(weights))
    counts = [weight.shape[0] for weight in weights]
    programs = sum(triton.cdiv(count, tile.rows) for count in counts)
    _products_kernel[(programs,)](
        x, *weights, *missing, *biases, *missing, *outs, *missing, *counts, *([0] * len(missing)),
        None if residual is None else residual.contiguous(), tokens, **meta(x, tokens, tile), **FUSED,
    )  # fmt: skip
    return outs


def meta(x: torch.Tensor, tokens: int, tile: Tile) -> dict[str, Any]:
    """What the kernels of this file are compiled for. Only the interpreter, in tests, has x on a CPU."""
    width = x.shape[-1]
    return {
        "WIDTH": width,
        "ROWS": tile.rows,
        "BLOCK": max(LEAST_BLOCK, min(tile.block, triton.next_power_of_2(width))),
        "TOKENS_PAD": 1 if tokens == 1 else MOST_TOKENS,
        "UPCAST": x.dtype == torch.float32 or not x.is_cuda,  # the interpreter has no bfloat16 products
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **early_launch(x),
    }


@triton.jit
def row_sums(
    x, weight, first, rows, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS_PAD: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [T, E] times `ROWS` rows of weight [N, E] from `first` on: float32 [T padded, ROWS].

    Waits for x (early_launch.py); one token's first weights are on their way before.
    """
    o_n = first + tl.arange(0, ROWS)
    o_k = tl.arange(0, BLOCK)
    m_n = (o_n < rows)[:, None]
    p_weight = weight + o_n.to(tl.int64)[:, None] * WIDTH + o_k[None, :]  # [ROWS, BLOCK]
    if TOKENS_PAD == 1:
        b_weight = _weights(p_weight, m_n, 0, o_k, WIDTH, BLOCK)
        wait_for_inputs(EARLY)
        sums = b_weight.to(tl.float32) * _inputs(x, 0, o_k, WIDTH, BLOCK)[None, :]  # [ROWS, BLOCK]
        for start in range(BLOCK, WIDTH, BLOCK):
            b_weight = _weights(p_weight, m_n, start, o_k, WIDTH, BLOCK)
            sums += b_weight.to(tl.float32) * _inputs(x, start, o_k, WIDTH, BLOCK)[None, :]
        return tl.sum(sums, 1)[None, :]  # [1, ROWS]
    wait_for_inputs(EARLY)
    o_t = tl.arange(0, TOKENS_PAD)
    m_t = (o_t < tokens)[:, None]
    p_x = x + o_t[:, None] * WIDTH + o_k[None, :]  # [T padded, BLOCK]
    products = tl.zeros([TOKENS_PAD, ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        m_k = (start + o_k < WIDTH)[None, :]
        b_weight = tl.load(p_weight + start, mask=m_n & m_k, other=0.0)
        b_x = tl.load(p_x + start, mask=m_t & m_k, other=0.0)
        if UPCAST:
            b_weight, b_x = b_weight.to(tl.float32), b_x.to(tl.float32)
        products = tl.dot(b_x, tl.trans(b_weight), products, input_precision="ieee")
    return products


@triton.jit
def _weights(p_weight, m_n, start, o_k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A block of some rows, from input `start` on: [ROWS, BLOCK]."""
    if WIDTH % BLOCK == 0:
        b_weight = tl.load(p_weight + start, mask=m_n, other=0.0)
    else:
        b_weight = tl.load(p_weight + start, mask=m_n & (start + o_k < WIDTH)[None, :], other=0.0)
    return b_weight


@triton.jit
def _inputs(x, start, o_k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Inputs of one token from `start` on, float32 [BLOCK]."""
    if WIDTH % BLOCK == 0:
        b_x = tl.load(x + start + o_k)
    else:
        b_x = tl.load(x + start + o_k, mask=start + o_k < WIDTH, other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def _one_product(
    x, weight, bias, out, first, rows, residual, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS_PAD: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    sums = row_sums(x, weight, first, rows, tokens, WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)
    o_t, o_n = tl.arange(0, TOKENS_PAD), first + tl.arange(0, ROWS)
    mask = (o_t < tokens)[:, None] & (o_n < rows)[None, :]
    place = o_t[:, None] * rows + o_n[None, :]  # [T padded, ROWS]
    if bias is not None:
        sums += tl.load(bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        rounded = sums.to(out.dtype.element_ty).to(tl.float32)
        sums = rounded + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _products_kernel(
    x, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, rows_0, rows_1, rows_2,
    residual, tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TOKENS_PAD: tl.constexpr,
    UPCAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    end_0 = tl.cdiv(rows_0, ROWS)
    end_1 = end_0 + tl.cdiv(rows_1, ROWS)
    # A branch for each matrix, not a choice of pointers: what is known of each one's alignment stays known.
    if i_block < end_0:
        _one_product(x, weight_0, bias_0, out_0, i_block * ROWS, rows_0, residual, tokens,
                     WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)  # fmt: skip
    elif i_block < end_1:
        if weight_1 is not None:
            _one_product(x, weight_1, bias_1, out_1, (i_block - end_0) * ROWS, rows_1, residual, tokens,
                         WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)  # fmt: skip
    else:
        if weight_2 is not None:
            _one_product(x, weight_2, bias_2, out_2, (i_block - end_1) * ROWS, rows_2, residual, tokens,
                         WIDTH, ROWS, BLOCK, TOKENS_PAD, UPCAST, EARLY)  # fmt: skip


def products(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    residual: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> list[torch.Tensor]:
    """products_reference, in one launch on a GPU if that is made for so many tokens."""
    if x.is_cuda and tiles(x.numel() // x.shape[-1]):
        return products_triton(x, weights, biases, residual, tile)
    return products_reference(x, weights, biases, residual)
