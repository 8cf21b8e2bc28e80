"""The last step of split attention: the pieces' softmax sums become one output.

A sequence of length 0 (an empty place) has no piece with a row, and gets zeros.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .compile_options import UNFUSED
from .early_launch import early_launch, wait_for_inputs


class Pieces(NamedTuple):
    """Results of the pieces of lists, float32.

    Weighted values partial [B, Hq, P, D] and sums [B, Hq, P] of the weights, both relative to 2 ** tops
    [B, Hq, P]. A piece without rows has a top of -inf, and whatever else it holds counts for nothing.
    """

    partial: torch.Tensor
    tops: torch.Tensor
    sums: torch.Tensor

    @property
    def splits(self) -> int:
        return self.tops.shape[-1]


def empty_pieces(query: torch.Tensor, splits: int) -> Pieces:
    """For query [B, Hq, D]."""
    batch, heads, dim = query.shape
    partial = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=query.device)
    tops = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=query.device)
    return Pieces(partial, tops[0], tops[1])


def combine_pieces(pieces: Pieces, sink_logits: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write out [B, Hq, D]. sink_logits [Hq]: logits that take mass without a value."""
    batch, heads, splits, dim = pieces.partial.shape
    block_d = min(triton.next_power_of_2(dim), 32)
    # Fused, each lane of a sum would add its own product unrounded to the others' rounded ones: the lanes'
    # totals would differ in their last bit, and those that write the same output race.
    _combine_kernel[(batch * heads, triton.cdiv(dim, block_d))](
        *pieces, sink_logits, out,
        HEADS=heads, DIM=dim, BLOCK_D=block_d, SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits),
        HAS_SINK=sink_logits is not None, num_warps=4, **UNFUSED, **early_launch(out),
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    partial, tops, sums, sink_logits, out,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, HAS_SINK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    wait_for_inputs(EARLY)
    i_bq = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, SPLITS_PAD)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    b_top = tl.load(tops + i_bq * SPLITS + o_s, mask=o_s < SPLITS, other=float("-inf"))  # [SPLITS]
    m_s = b_top > float("-inf")
    b_sum = tl.load(sums + i_bq * SPLITS + o_s, mask=o_s < SPLITS, other=0.0)
    p_partial = partial + (i_bq * SPLITS + o_s[:, None]) * DIM + o_d[None, :]
    # All at once: of a piece without rows, which only its top tells, they are whatever lay there.
    b_part = tl.load(p_partial, mask=(o_s < SPLITS)[:, None] & m_d[None, :], other=0.0)  # [SPLITS, D]
    b_sum = tl.where(m_s, b_sum, 0.0)
    b_part = tl.where(m_s[:, None], b_part, 0.0)
    top = tl.max(b_top, 0)
    if HAS_SINK:
        sink = tl.load(sink_logits + i_bq % HEADS).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top > float("-inf"), top, 0.0)  # an empty place has no rows at all
    b_weight = tl.exp2(b_top - top)
    total = tl.sum(b_weight * b_sum, 0)
    if HAS_SINK:
        total += tl.exp2(sink - top)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + i_bq * DIM + o_d, b_out.to(out.dtype.element_ty), mask=m_d)
