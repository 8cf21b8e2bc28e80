"""Selecting and resolving in thread block clusters, emulated on the CPU, against the references."""

import pytest
import torch

from offload_runtime.kernels.history import empty_history, members_of
from offload_runtime.kernels.labels import quantise
from offload_runtime.kernels.residency import resolve_reference
from offload_runtime.kernels.scores import label_scores_reference
from offload_runtime.kernels.sticky import sticky_topk_reference
from offload_runtime.kernels.topk import select_topk_reference

from .cuda_on_cpu import build, launch, needs_compiler
from .test_residency import Resident, random_selection

pytestmark = needs_compiler
SINKS, RECENT, CLUSTER = 4, 64, 8


def resolve_emulated(backwards):
    def run(
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step, phase, attended, kept_steps,
        miss_tokens, miss_slots, miss_counts, counters,
    ):  # fmt: skip
        library = build("resolve_cluster", (("CLUSTER", CLUSTER), ("PHASE", phase)), ("resolve_cluster.cu",))
        batch, kv_heads, k_max = tokens.shape
        tensors = (tokens, counts, slot_of_token, token_in_slot, stamps, hand, step)
        written = (miss_tokens, miss_slots, miss_counts, counters)
        numbers = (kv_heads, k_max, slot_of_token.shape[-1], token_in_slot.shape[-1], attended, kept_steps)
        launch(library, kv_heads, batch, *tensors, *written, *numbers, backwards=backwards)

    return run


@pytest.mark.parametrize("kept_steps", [0, 2, 8])
@pytest.mark.parametrize(("n_slots", "k_max"), [(64, 64), (150, 100), (2500, 1300), (12000, 9000)])
def test_resolve(n_slots, k_max, kept_steps):
    """Both phases of four steps, with few and with many slots, some empty selections; every tensor agrees."""
    generator = torch.Generator().manual_seed(n_slots + kept_steps)
    capacity = max(500, 2 * k_max)
    reference, emulated = (Resident.empty(2, 2, capacity, n_slots, k_max, "cpu") for _ in range(2))
    for i in range(8):
        counts = [[k_max, k_max // (1 + i)], [k_max // 3, 0 if i % 3 else 1]]
        tokens, per_head = random_selection(generator, 2, 2, capacity, k_max, counts, "cpu")
        step = torch.tensor([1 + i // 2], dtype=torch.int32)
        reference.resolve(resolve_reference, tokens, per_head, step, i % 2, None, kept_steps)
        emulated.resolve(resolve_emulated(bool(i & 2)), tokens, per_head, step, i % 2, None, kept_steps)
        for name, expected in vars(reference).items():
            assert torch.equal(getattr(emulated, name), expected), (name, i)


class Problem:
    """Random 4-bit labels and queries of two KV heads a sequence."""

    def __init__(self, lengths, capacity, budgets, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        batch, self.shape = len(lengths), (len(lengths), 2, capacity)
        self.query_labels = self.normal(batch, 8, 32) * 0.3
        self.offsets = self.normal(batch, 8) * 2 + 10
        codes, scales = quantise(self.normal(batch, 2, capacity, 32) * 2 + self.normal(32), 4)
        self.codes, self.scales = codes.contiguous(), scales.contiguous()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.budgets = torch.tensor(budgets, dtype=torch.int32).view(batch, -1).expand(-1, 2).contiguous()
        self.k_max = int(self.budgets.max())

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def scores(self):
        scores = torch.empty(self.shape)
        labels = (self.query_labels, self.offsets, self.codes, self.scales, 4)
        label_scores_reference(*labels, self.lengths, SINKS, RECENT, scores)
        return scores

    def selection(self):
        tokens = torch.full((*self.shape[:2], self.k_max), 77, dtype=torch.int32)
        return tokens, torch.full(self.shape[:2], 77, dtype=torch.int32)

    def run(self, history=None, new_rows=0, attended=True, backwards=False):
        sticky, (tokens, counts) = history is not None, self.selection()
        defines = {
            "CHANNELS": 32,
            "BITS": 4,
            "GROUP": 4,
            "THREADS": 512,
            "CLUSTER": CLUSTER,
            "STICKY": int(sticky),
        }
        defines |= {"STEPS": 2, "PREFETCH": 1, "RESIDENT": 2}
        sources = ("label_scores.h", "cluster_topk.cuh", "select_cluster.cu")
        library = build("select_cluster", tuple(defines.items()), sources)
        labels = (self.query_labels, self.offsets, self.codes, self.scales)
        past = history if sticky else self.codes
        pointers = (*labels, self.budgets, self.lengths, past, tokens, counts)
        limits = (SINKS, RECENT, new_rows, attended)
        numbers = (2, self.shape[2], past.shape[-1], *limits, self.k_max)
        launch(library, 2, self.shape[0], *pointers, *numbers, backwards=backwards)
        return tokens, counts


def check(tokens, counts, expected_tokens, expected_counts, scores):
    """Counts and order exactly; the two selections only differ in tokens of nearly equal score."""
    assert torch.equal(counts, expected_counts)
    for b, per_head in enumerate(counts.tolist()):
        for h, count in enumerate(per_head):
            got, want = tokens[b, h, :count].long(), expected_tokens[b, h, :count].long()
            assert (tokens[b, h, count:] == -1).all()
            assert (got[1:] > got[:-1]).all()
            ours, theirs = scores[b, h, got].sort().values, scores[b, h, want].sort().values
            assert torch.allclose(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("backwards", [False, True])
def test_exact_selection(backwards):
    problem = Problem([5000, 3001, 70, 1], 5008, [700, 3000, 16, 16])
    expected = problem.selection()
    expected[0].fill_(-1)
    scores = problem.scores()
    select_topk_reference(scores, problem.budgets, problem.lengths, SINKS, RECENT, *expected)
    check(*problem.run(backwards=backwards), *expected, scores)


@pytest.mark.parametrize("scale", [0.0, 0.01, 300.0])
def test_scores_that_hardly_differ_or_lie_outside_the_bins(scale):
    problem = Problem([4000], 4000, [600])
    problem.query_labels *= scale
    expected, scores = problem.selection(), problem.scores()
    select_topk_reference(scores, problem.budgets, problem.lengths, SINKS, RECENT, *expected)
    tokens, counts = problem.run()
    check(tokens, counts, *expected, scores)
    if scale == 0:
        assert tokens[0, 0].tolist() == list(range(SINKS, SINKS + 600))


@pytest.mark.parametrize("new_rows", [0, 40, 5000])
def test_sticky_selection_and_its_history(new_rows):
    problem = Problem([5003, 3000, 100], 5003, [400, 256, 50])
    history = empty_history(*problem.shape, "cpu")
    for step in range(5):
        problem.query_labels += problem.normal(*problem.query_labels.shape) * 0.1
        before, scores, expected = history.clone(), problem.scores(), problem.selection()
        predicted = problem.run(history, new_rows, attended=False)
        assert torch.equal(history, before)
        tokens, counts = problem.run(history, new_rows, backwards=bool(step % 2))
        assert torch.equal(tokens, predicted[0])
        fixed = (new_rows, problem.lengths, SINKS, RECENT)
        sticky_topk_reference(scores, problem.budgets, *fixed, before.clone(), True, *expected)
        check(tokens, counts, *expected, scores)
        chosen = torch.zeros(history.shape, dtype=torch.int32)  # entry i is token SINKS + i
        chosen.scatter_add_(2, (tokens.long() - SINKS).clamp_min(0), (tokens >= 0).int())
        assert torch.equal(history.int(), (before.int() << 1 & 255) | chosen)
        for b, h in ((0, 0), (1, 1)):
            members = members_of(before[b, h], int(counts[b, h]), new_rows)
            assert step == 0 or int(((chosen[b, h] > 0) & ~members).sum()) <= new_rows
