"""Labels and queries to select by, and how a cluster kernel's selections have to agree with the reference."""

import math

import torch

from offload_runtime.kernels.admission import admit_reference, empty_candidates, most_candidates
from offload_runtime.kernels.history import empty_history, members_of
from offload_runtime.kernels.labels import quantise
from offload_runtime.kernels.scores import label_scores_reference
from offload_runtime.kernels.sticky import sticky_topk_reference

SINKS, RECENT = 4, 64


class Problem:
    """Random labels and queries; label cache entries past the lengths are NaN or 255.

    budgets: of each sequence a number, or a list with a number for each KV head.
    """

    def __init__(
        self, lengths, capacity, budgets, kv_heads=2, group=4, channels=32, bits=4, seed=0, device="cuda"
    ):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)
        batch = len(lengths)
        self.query_labels = self.normal(batch, kv_heads * group, channels) * 0.3
        self.offsets = self.normal(batch, kv_heads * group) * 2 + 10
        labels = self.normal(batch, kv_heads, capacity, channels) * 2 + self.normal(channels)
        scales = torch.full((batch, kv_heads, capacity, 2), float("nan"), device=device).half()
        codes = labels.half()
        if bits != 16:
            codes, scales = quantise(labels, bits)
        for b, length in enumerate(lengths):
            codes[b, :, length:] = float("nan") if bits == 16 else 255
            scales[b, :, length:] = float("nan")
        self.codes, self.scales, self.bits = codes.contiguous(), scales.contiguous(), bits
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        per_head = torch.tensor(budgets, dtype=torch.int32, device=device).view(batch, -1)
        self.budgets = per_head.expand(-1, kv_heads).contiguous()  # [B, Hkv]
        self.shape = (batch, kv_heads, capacity)
        self.k_max = int(self.budgets.max())

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def empty_selection(self):
        batch, kv_heads, _ = self.shape
        tokens = torch.full((batch, kv_heads, self.k_max), -1, dtype=torch.int32, device=self.device)
        return tokens, torch.zeros(batch, kv_heads, dtype=torch.int32, device=self.device)

    @property
    def labels(self):
        """What every kernel that scores begins with."""
        return self.query_labels, self.offsets, self.codes, self.scales

    def empty_admission(self):
        """What may enter (tokens, counts) and the candidates, all of them garbage."""
        entering, counts = self.empty_selection()
        batch, kv_heads, capacity = self.shape
        listed = empty_candidates(batch, kv_heads, most_candidates(self.k_max, capacity), self.device)
        for written in (entering, counts, *listed):
            written.fill_(55)
        return entering, counts, listed

    def empty_history(self):
        return empty_history(*self.shape, self.device)

    def scores(self):
        scores = torch.empty(self.shape, device=self.device)
        label_scores_reference(
            self.query_labels, self.offsets, self.codes, self.scales, self.bits, self.lengths,
            SINKS, RECENT, scores,
        )  # fmt: skip
        return scores


def check(tokens, counts, expected_tokens, expected_counts, scores, most=None):
    """Counts and order exactly; the two selections only differ in tokens of nearly equal score.

    most: by which scores may differ, 1e-3 of their spread by default.
    """
    assert torch.equal(counts, expected_counts)
    for b, per_head in enumerate(counts.tolist()):
        for h, count in enumerate(per_head):
            got, want = tokens[b, h, :count].long(), expected_tokens[b, h, :count].long()
            assert (tokens[b, h, count:] == -1).all()
            assert (got[1:] > got[:-1]).all()
            if count == 0:
                continue
            selectable = scores[b, h][scores[b, h].isfinite()]
            assert scores[b, h, got].isfinite().all(), "a token outside the selectable span"
            ours, theirs = scores[b, h, got].sort().values, scores[b, h, want].sort().values
            spread = (selectable.max() - selectable.min()).item()
            assert (ours - theirs).abs().max().item() <= (1e-3 * spread if most is None else most)


def check_admission(problem, admit, history, new_rows, attended):
    """One step's first part from a history, which moves on in place. admit(history, new_rows, attended)."""
    before, scores, expected = history.clone(), problem.scores(), problem.empty_admission()
    entering, counts, listed = admit(history, new_rows, attended)
    fixed = (problem.budgets, new_rows, problem.lengths, SINKS, RECENT)
    moved_on = before.clone()
    admit_reference(scores, *fixed, moved_on, attended, *expected)
    assert torch.equal(history, moved_on)
    check_listed(entering, counts, *expected[:2], scores)
    check_listed(listed.tokens, listed.counts, expected[2].tokens, expected[2].counts, scores)
    for b, per_head in enumerate(listed.counts.tolist()):
        for h, count in enumerate(per_head):
            # Scores in the kernel are in units of log 2.
            own = listed.scores[b, h, :count] * math.log(2)
            torch.testing.assert_close(
                own, scores[b, h, listed.tokens[b, h, :count].long()], rtol=1e-3, atol=1e-2
            )
    return entering, counts, listed


def check_listed(tokens, counts, expected_tokens, expected_counts, scores):
    """As check(), of a list that says nothing past its count."""
    tokens, expected_tokens = tokens.clone(), expected_tokens.clone()
    past = torch.arange(tokens.shape[-1], device=tokens.device) >= counts[..., None]
    tokens[past] = -1
    expected_tokens[past] = -1
    check(tokens, counts, expected_tokens, expected_counts, scores)


def check_sticky_steps(problem, select, new_rows, steps, most=None):
    """Each step's selection from the same history as the reference's, and the history it leaves.

    select(history, new_rows, attended, step) gives what may enter (tokens, counts), the candidates, and the
    selection's tokens and counts.
    """
    history = problem.empty_history()
    for step in range(steps):
        problem.query_labels += problem.normal(*problem.query_labels.shape) * 0.1
        before, scores, expected = history.clone(), problem.scores(), problem.empty_selection()
        predicted = select(history, new_rows, False, step)[3]
        assert torch.equal(history, before)
        entering, entering_counts, listed, tokens, counts = select(history, new_rows, True, step)
        assert torch.equal(tokens, predicted)
        fixed = (new_rows, problem.lengths, SINKS, RECENT)
        sticky_topk_reference(scores, problem.budgets, *fixed, before.clone(), True, *expected)
        check(tokens, counts, *expected, scores, most)
        # Entry i of a history is token SINKS + i.
        chosen = torch.zeros(history.shape, dtype=torch.int32, device=problem.device)
        chosen.scatter_add_(2, (tokens.long() - SINKS).clamp_min(0), (tokens >= 0).int())
        assert torch.equal(history.int(), (before.int() << 1 & 255) | chosen)
        for b, per_head in enumerate(counts.tolist()):
            for h, count in enumerate(per_head):
                members = members_of(before[b, h], count, new_rows)
                new = (chosen[b, h] > 0) & ~members
                assert step == 0 or int(new.sum()) <= new_rows
                admitted = entering[b, h, : int(entering_counts[b, h])].long() - SINKS
                assert not members[admitted].any()
                assert set(new.nonzero().flatten().tolist()) <= set(admitted.tolist())
                assert int(listed.counts[b, h]) == int(members.sum()) + len(admitted)
