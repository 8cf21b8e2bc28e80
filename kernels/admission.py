"""Sticky selection in two parts: which tokens may enter, and which candidates are selected.

What may enter is known before the selection is, and the members are resident already, so that a step's rows
can be on their way while the second part runs. Both together select what sticky.py's sticky_topk selects.
What may enter is not always selected: not what is below the best k of all tokens, a cut that is not looked
for.
"""

from typing import NamedTuple

import torch

from .history import members_of


class Candidates(NamedTuple):
    """Members and the tokens that may enter, ascending: tokens and scores [B, Hkv, C], counts [B, Hkv]."""

    tokens: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor


def most_candidates(budget: int, capacity: int) -> int:
    """With those that may enter, members are as many as fit into 2 K tokens, or one selection."""
    return min(2 * budget, capacity)


def empty_candidates(batch: int, kv_heads: int, most: int, device: torch.device | str) -> Candidates:
    """Lists of up to `most` candidates."""
    tokens = torch.zeros(batch, kv_heads, most, dtype=torch.int32, device=device)
    scores = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    return Candidates(tokens, scores, torch.zeros(batch, kv_heads, dtype=torch.int32, device=device))


def admit_reference(
    scores: torch.Tensor,
    budgets: torch.Tensor,
    new_rows: int,
    lengths: torch.Tensor,
    sinks: int,
    recent: int,
    history: torch.Tensor,
    attended: bool,
    entering: torch.Tensor,
    entering_counts: torch.Tensor,
    candidates: Candidates,
) -> None:
    """Admit the best tokens that are no members, and list them with the members.

    scores [B, Hkv, N] float32; budgets [B, Hkv] and lengths [B] int32; history [B, Hkv, P] uint8 of
    history.py. attended: the selection will be the step's, so the history moves a step on; else (a
    prediction) it stays as it is. Writes entering [B, Hkv, K] int32 (ascending; what is past the count is
    left), entering_counts [B, Hkv] int32 and the candidates. As many are admitted as may enter, or as the
    members are fewer than k.
    """
    for b, length in enumerate(lengths.tolist()):
        span = max(sinks, length - recent) - sinks
        for h in range(scores.shape[1]):
            k = min(int(budgets[b, h]), span)
            row, past = scores[b, h, sinks : sinks + span], history[b, h, :span]
            member = members_of(past, k, new_rows)
            count = int(member.sum())
            admitted = min(max(new_rows, k - count), k, span - count)
            order = row.sort(dim=-1, descending=True, stable=True).indices
            new = order[~member[order]][:admitted].sort().values
            listed = member.clone()
            listed[new] = True
            listed = listed.nonzero().flatten()
            entering[b, h, :admitted] = (new + sinks).int()
            entering_counts[b, h] = admitted
            candidates.tokens[b, h, : len(listed)] = (listed + sinks).int()
            candidates.scores[b, h, : len(listed)] = row[listed]
            candidates.counts[b, h] = len(listed)
            if attended:
                past <<= 1


def choose_reference(
    candidates: Candidates,
    budgets: torch.Tensor,
    sinks: int,
    history: torch.Tensor,
    attended: bool,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    slots: torch.Tensor,
    slot_of_token: torch.Tensor,
    stamps: torch.Tensor,
    step: torch.Tensor,
    phase: int,
    counters: torch.Tensor,
) -> None:
    """Select the best candidates, ties to the earliest, and stamp their slots as attended to.

    Writes tokens [B, Hkv, K] int32 (ascending, -1 past the count) and counts [B, Hkv] int32; attended: the
    history [B, Hkv, P], which admit_reference moved on, takes the selection in, and slots [B, Hkv, K] int32
    its slots, -1 where a token has none. slot_of_token, stamps, step, phase and counters as in
    residency.resolve_reference: what is selected counts as SELECTED and HITS, for misses are counted where
    they get slots.
    """
    tokens.fill_(-1)
    for b in range(tokens.shape[0]):
        for h in range(tokens.shape[1]):
            count = int(candidates.counts[b, h])
            k = min(int(budgets[b, h]), count)
            order = candidates.scores[b, h, :count].sort(dim=-1, descending=True, stable=True).indices
            chosen = candidates.tokens[b, h, order[:k].sort().values].long()
            tokens[b, h, :k] = chosen.int()
            counts[b, h] = k
            counters[b, phase, :2] += k
            if attended:
                history[b, h, chosen - sinks] |= 1
                of_chosen = slot_of_token[b, h, chosen]
                slots[b, h, :k] = of_chosen
                stamps[b, h, of_chosen[of_chosen >= 0].long(), 0] = int(step)
