"""Select the k best-scored tokens of each KV head, in ascending token order.

Exact: every token above the k-th score is taken, and of those equal to it the
earliest. Ascending order lets the gather walk host memory forwards (PCIe
address translation: 2 to 3 times the rate of random order at 1 GiB and more)
and makes attention independent of where a row lies.
"""

import torch
import triton
import triton.language as tl


def select_topk_reference(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Write the selection of each sequence and KV head.

    scores [B, Hkv, N] float32; budgets [B] int32: k of each sequence, at most
    K; lengths [B] int32; tokens [B, Hkv, K] int32 gets the selected positions,
    ascending, -1 past the count; counts [B] int32 gets
    min(k, selectable tokens), the same for all KV heads.
    """
    tokens.fill_(-1)
    for b, (budget, length) in enumerate(zip(budgets.tolist(), lengths.tolist(), strict=True)):
        end = max(sinks, length - recent)
        count = min(budget, end - sinks)
        counts[b] = count
        order = scores[b, :, sinks:end].sort(-1, descending=True, stable=True).indices
        chosen = order[:, :count].sort(-1).values + sinks  # [Hkv, count]
        tokens[b, :, :count] = chosen.int()
