"""How the cluster kernels of sticky selection's two parts have to agree with the references."""

import math

import torch

from offload_runtime.kernels.admission import (
    Candidates,
    admit_reference,
    choose_reference,
    empty_candidates,
    most_candidates,
)
from offload_runtime.kernels.history import REMEMBERED, members_of
from offload_runtime.kernels.residency import ENTERING, HITS, SELECTED, resolve_reference
from offload_runtime.kernels.sticky import sticky_topk_reference

from .selection_problem import RECENT, SINKS, check
from .test_residency import Resident

# A problem's lengths, capacity and budgets.
SHORTER = ([900, 500, 60], 1003, [[90, 300], [0, 20], [30, 30]])


class Sticky:
    """A problem's history and resident set, and what both parts write: garbage at first."""

    def __init__(self, problem, n_slots=None):
        batch, kv_heads, capacity = problem.shape
        most = most_candidates(problem.k_max, capacity)
        self.problem, self.history = problem, problem.empty_history()
        self.resident = Resident.empty(
            batch, kv_heads, capacity, n_slots or most, problem.k_max, problem.device
        )
        self.entering, self.selection = problem.empty_selection(), problem.empty_selection()
        self.slots = torch.empty_like(self.selection[0])
        self.candidates = empty_candidates(batch, kv_heads, most, problem.device)
        for written in (*self.entering, *self.selection, self.slots, *self.candidates):
            written.fill_(55)
        self.step = torch.ones(1, dtype=torch.int32, device=problem.device)

    def copy(self):
        twin = Sticky(self.problem, self.resident.token_in_slot.shape[-1])
        for mine, other in zip(self.tensors(), twin.tensors(), strict=True):
            other.copy_(mine)
        return twin

    def tensors(self):
        lists = (*self.entering, *self.selection, self.slots, *self.candidates)
        return (self.history, *vars(self.resident).values(), *lists, self.step)

    @property
    def limits(self):
        problem = self.problem
        return problem.budgets, problem.lengths, SINKS, RECENT

    def admit(self, run, new_rows, attended, phase=1):
        """By a function like admit_in_clusters."""
        problem, resident = self.problem, self.resident
        budgets, *fixed = self.limits
        lists = (self.history, attended, *self.entering, self.candidates)
        labels, slots = (*problem.labels, problem.bits), (resident.maps, self.step, phase, REMEMBERED)
        run(*labels, budgets, new_rows, *fixed, *lists, *slots, resident.misses)

    def choose(self, run, attended, phase=1):
        """By a function like choose_in_clusters."""
        resident = self.resident
        lists = (self.candidates, self.problem.budgets, SINKS, self.history, attended, *self.selection)
        stamps = (resident.slot_of_token, resident.stamps, self.step, phase, resident.counters)
        run(*lists, self.slots, *stamps)


def check_admission(before, after, new_rows, attended, phase):
    """A first part's results against the reference's from the same history; slots for what it lets in."""
    problem, scores, expected = before.problem, before.problem.scores(), before.copy()
    budgets, *fixed = before.limits
    lists = (expected.history, attended, *expected.entering, expected.candidates)
    admit_reference(scores, budgets, new_rows, *fixed, *lists)
    assert torch.equal(after.history, expected.history)
    check_listed(after.entering, expected.entering, scores)
    listed, wanted = after.candidates, expected.candidates
    check_listed((listed.tokens, listed.counts), (wanted.tokens, wanted.counts), scores)
    for b, per_head in enumerate(listed.counts.tolist()):
        for h, count in enumerate(per_head):
            own, theirs = listed.scores[b, h, :count], scores[b, h, listed.tokens[b, h, :count].long()]
            # Scores in the kernel are in units of log 2.
            torch.testing.assert_close(own * math.log(2), theirs, rtol=1e-3, atol=1e-2)
    resident = before.copy().resident
    resident.resolve(resolve_reference, *after.entering, before.step, phase, False, REMEMBERED, ENTERING)
    for name, value in vars(resident).items():
        assert torch.equal(getattr(after.resident, name), value), name
    assert problem is after.problem


def check_listed(found, expected, scores):
    """As check(), of lists (tokens, counts) that say nothing past their counts."""
    cut = []
    for tokens, counts in (found, expected):
        past = torch.arange(tokens.shape[-1], device=tokens.device) >= counts[..., None]
        cut += [tokens.masked_fill(past, -1), counts]
    check(*cut, scores)


def check_sticky_steps(problem, runs, new_rows, steps, most=None):
    """Each step's parts against the references, and both together against sticky_topk_reference.

    runs(step, attended) gives the functions of both parts. A step is predicted first, which selects the same
    and moves nothing but rows.
    """
    sticky = Sticky(problem)
    for step in range(steps):
        problem.query_labels += problem.normal(*problem.query_labels.shape) * 0.1
        sticky.step += 1
        predicted = None
        for attended in (False, True):
            admit, choose = runs(step, attended)
            before = sticky.copy()
            sticky.admit(admit, new_rows, attended, int(attended))
            check_admission(before, sticky, new_rows, attended, int(attended))
            chosen = sticky.copy()
            sticky.choose(choose, attended, int(attended))
            chosen.choose(choose_reference, attended, int(attended))
            for mine, reference in zip(sticky.tensors(), chosen.tensors(), strict=True):
                assert torch.equal(mine, reference)
            expected, scores, (tokens, counts) = problem.empty_selection(), problem.scores(), sticky.selection
            budgets, *fixed = sticky.limits
            rest = (before.history.clone(), attended, *expected)
            sticky_topk_reference(scores, budgets, new_rows, *fixed, *rest)
            check(tokens, counts, *expected, scores, most)
            assert predicted is None or torch.equal(tokens, predicted)
            predicted = tokens.clone()
        check_what_is_new(before, sticky, new_rows, step)


def check_what_is_new(before, after, new_rows, step):
    """At most new_rows of the selection are no members; the members have kept their slots; all is counted."""
    tokens, counts = after.selection
    for b, per_head in enumerate(counts.tolist()):
        for h, count in enumerate(per_head):
            chosen = tokens[b, h, :count].long()
            members = members_of(before.history[b, h], count, new_rows)
            assert step == 0 or int((~members[chosen - SINKS]).sum()) <= new_rows
            slots = after.resident.slot_of_token[b, h, chosen]
            assert (slots >= 0).all()
            assert torch.equal(after.slots[b, h, :count], slots)
            assert (after.resident.stamps[b, h, slots.long(), 0] == int(after.step)).all()
    selected = (after.resident.counters - before.resident.counters)[:, 1]
    assert torch.equal(selected[:, SELECTED], counts.sum(1))
    assert torch.equal(selected[:, SELECTED] - selected[:, HITS], after.resident.miss_counts.sum(1))


def check_shorter(problem, admit):
    """What a history holds past the end of a sequence that became shorter neither counts nor changes."""
    problem.lengths -= torch.tensor([333, 0, 0], dtype=torch.int32, device=problem.device)
    sticky = Sticky(problem)
    sticky.history.random_(0, 256, generator=problem.generator)
    before = sticky.copy()
    sticky.admit(admit, 16, True)
    check_admission(before, sticky, 16, True, 1)


def check_equal_scores(problem, choose, phase=1):
    """Few distinct scores, of lists that are cut, taken whole, or of which none is wanted."""
    sticky = Sticky(problem)
    generator, most = problem.generator, sticky.candidates.tokens.shape[-1]
    shape = sticky.candidates.scores.shape
    tokens = torch.arange(most, dtype=torch.int32, device=problem.device) * 2 + SINKS
    scores = torch.randint(-3, 4, shape, generator=generator, device=problem.device) * 0.5
    counts = (problem.budgets * 1.7).int().clamp(1, most)
    counts[:, -1] = torch.minimum(problem.budgets[:, -1], counts[:, -1])
    sticky.candidates = Candidates(tokens.expand(shape).contiguous(), scores, counts)
    sticky.resident.slot_of_token.random_(-1, sticky.resident.token_in_slot.shape[-1], generator=generator)
    expected = sticky.copy()
    sticky.choose(choose, True, phase)
    expected.choose(choose_reference, True, phase)
    for mine, reference in zip(sticky.tensors(), expected.tensors(), strict=True):
        assert torch.equal(mine, reference)
