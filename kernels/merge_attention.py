"""Merge attention over two sets of keys into attention over both, by their log-sum-exps.

out = (e^a out_a + e^b out_b) / (e^a + e^b), with a and b the log-sum-exps of the logits.
At T 8,192, Hq 32, D 128 the Triton form moves 0.2 GB, 75 us at 2.7 TB/s: 0.3 % of the
26 ms that attention over 131,072 keys takes at 665 TFLOP/s (arithmetic). As separate
PyTorch ops in float32 it would be 1.3 GB and 0.27 GB of temporaries.
"""

import torch
import triton
import triton.language as tl

from .compile_options import FUSED


def merge_attention(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge `out` and `other` into `into` (default out); shapes as in merge_attention_reference."""
    run = merge_attention_triton if out.is_cuda else merge_attention_reference
    return run(out, lse, other, other_lse, into)


def merge_attention_reference(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """out, other, into [1, Hq, T, D] of any float types, lse and other_lse [1, Hq, T] float32, natural
    logarithms; returns into."""
    share = torch.sigmoid(other_lse - lse)[..., None]  # other's share of the softmax, [1, Hq, T, 1]
    into = out if into is None else into
    return into.copy_(out.float() + share * (other.float() - out.float()))


def merge_attention_triton(
    out: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    into = out if into is None else into
    _, heads, count, dim = out.shape
    assert out.stride(3) == other.stride(3) == into.stride(3) == 1
    block = 32  # 32 rows of 128 bf16 numbers: 8 KiB of each input a program
    _merge_kernel[(triton.cdiv(count, block), heads)](
        out, lse, other, other_lse, into, count,
        out.stride(1), out.stride(2), lse.stride(1), lse.stride(2),
        other.stride(1), other.stride(2), other_lse.stride(1), other_lse.stride(2),
        into.stride(1), into.stride(2),
        DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, num_warps=4, **FUSED,
    )  # fmt: skip
    return into


@triton.jit
def _merge_kernel(
    out, lse, other, other_lse, into, count,
    out_h, out_t, lse_h, lse_t, other_h, other_t, other_lse_h, other_lse_t, into_h, into_t,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, DIM_PAD)
    m_t = o_t < count
    mask = m_t[:, None] & (o_d < DIM)[None, :]
    b_lse = tl.load(lse + i_h * lse_h + o_t * lse_t, mask=m_t, other=0.0)  # [BLOCK]
    b_other_lse = tl.load(other_lse + i_h * other_lse_h + o_t * other_lse_t, mask=m_t, other=0.0)
    lead = tl.minimum(b_lse - b_other_lse, 80.0)  # e^80 still is a float32
    share = 1.0 / (1.0 + tl.exp(lead))  # other's share of the softmax
    p_out = out + i_h * out_h + o_t[:, None] * out_t + o_d[None, :]
    p_other = other + i_h * other_h + o_t[:, None] * other_t + o_d[None, :]
    b_out = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, D]
    b_other = tl.load(p_other, mask=mask, other=0.0).to(tl.float32)
    merged = b_out + share[:, None] * (b_other - b_out)
    p_into = into + i_h * into_h + o_t[:, None] * into_t + o_d[None, :]
    tl.store(p_into, merged.to(into.dtype.element_ty), mask=mask)
