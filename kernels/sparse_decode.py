"""Decode attention over sinks, selected rows and the recent ring, in token order.

The rows are read where they lie. The order of the sum is the order of the
tokens, never of the slots, so the result has the same bits whether a row was
resident, prefetched or fetched late.
"""

import torch

from .attend_pieces import BLOCK_BYTES, PROGRAMS, STAGES, WARPS, Inputs, attend_pieces, block_rows, cut
from .combine_pieces import combine_pieces, empty_pieces


def sparse_attention(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor | None,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to sinks, selection and recent tokens; shapes as in sparse_attention_reference."""
    run = sparse_attention_triton if query.is_cuda else sparse_attention_reference
    return run(
        query, slots, tokens, counts, slot_of_token, lengths, sinks, recent, scale, softcap, sink_logits
    )


def sparse_attention_reference(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor | None,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to the sinks, the selection and the recent tokens; returns [B, Hq, D].

    query [B, Hq, D]; slots [B, Hkv, sinks + recent + n_slots, 2 D]; tokens
    [B, Hkv, K] ascending and counts [B, Hkv] int32: the selection; slot_of_token
    [B, Hkv, N] int32, or None where tokens are their slots; lengths [B] int32, the current token
    included. softcap bounds logits as softcap * tanh(x / softcap), 0 for none; sink_logits [Hq]
    are learned logits that take mass without a value (GPT-OSS). A sequence of
    length 0 (an empty place) has nothing to attend to and gets zeros.
    """
    heads, dim = query.shape[1:]
    kv_heads = slots.shape[1]
    first_slot = sinks + recent
    out = torch.empty_like(query)
    for b, length in enumerate(lengths.tolist()):
        start = max(sinks, length - recent)
        ring = sinks + torch.arange(start, max(start, length), device=query.device) % recent
        sink = torch.arange(min(sinks, length), device=query.device)
        for h in range(kv_heads):
            chosen = tokens[b, h, : int(counts[b, h])].long()
            own = chosen if slot_of_token is None else slot_of_token[b, h, chosen].long()
            where = torch.cat([sink, own + first_slot, ring])
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


def sparse_attention_triton(
    query: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slot_of_token: torch.Tensor | None,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
    programs: int = PROGRAMS,
    block_bytes: int = BLOCK_BYTES,
    num_stages: int = STAGES,
    num_warps: int = WARPS,
) -> torch.Tensor:
    """Two launches: partial softmax sums over fixed pieces of the row list, then their combination.

    The list is sinks, selection, ring, in token order. How it is cut depends on
    shapes only (about `programs` pieces in all), so the bits of the result depend on the selection alone.
    A program reads block_bytes of keys at a time and as much of values.
    """
    block = block_rows(slots, block_bytes)
    rows, lists = sinks + tokens.shape[2] + recent, tokens.shape[0] * tokens.shape[1]
    chunk, splits = cut(rows, lists, block, programs)
    pieces, out = empty_pieces(query, splits), torch.empty_like(query, memory_format=torch.contiguous_format)
    inputs = Inputs(query, slots, slot_of_token, lengths, sinks, recent, scale, softcap)
    attend_pieces(
        inputs, tokens, counts, pieces, 0, splits, chunk, block, num_stages=num_stages, num_warps=num_warps
    )
    combine_pieces(pieces, sink_logits, out)
    return out
