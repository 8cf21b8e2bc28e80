"""Decode attention over sinks, selected rows and the recent ring, in token order.

The rows are read where they lie. The order of the sum is the order of the
tokens, never of the slots, so the result has the same bits whether a row was
resident, prefetched or fetched late.
"""

import torch
import triton
import triton.language as tl


def sparse_attention_reference(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the sinks, the selection and the recent tokens; returns [B, Hq, D].

    query [B, Hq, D]; slots [B, Hkv, sinks + recent + n_slots, 2 D]; tokens
    [B, Hkv, K] ascending and counts [B] int32: the selection; slot_of_token
    [B, Hkv, N] int32; lengths [B] int32, the current token included. softcap
    bounds logits as softcap * tanh(x / softcap), 0 for none; sink_logits [Hq]
    are learned logits that take mass without a value (GPT-OSS).
    """
    batch, heads, dim = query.shape
    kv_heads = slots.shape[1]
    first_slot = sinks + recent
    out = torch.empty_like(query)
    for b, length in enumerate(lengths.tolist()):
        start = max(sinks, length - recent)
        ring = sinks + torch.arange(start, length, device=query.device) % recent
        sink = torch.arange(min(sinks, length), device=query.device)
        for h in range(kv_heads):
            chosen = tokens[b, h, : int(counts[b])].long()
            where = torch.cat([sink, slot_of_token[b, h, chosen].long() + first_slot, ring])
            rows = slots[b, h, where].float()  # [n, 2 D]
            group = slice(h * heads // kv_heads, (h + 1) * heads // kv_heads)
            logits = query[b, group].float() @ rows[:, :dim].T * scale  # [G, n]
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[group, None].float()], -1)
            mass = torch.softmax(logits, -1)[:, : len(where)]
            out[b, group] = (mass @ rows[:, dim:]).to(out.dtype)
    return out
