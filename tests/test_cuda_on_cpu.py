"""Selecting and resolving in thread block clusters, emulated on the CPU, against the references."""

import pytest
import torch

from offload_runtime.kernels.residency import resolve_reference
from offload_runtime.kernels.topk import select_topk_reference

from .cuda_on_cpu import build, launch, needs_compiler
from .hopper import missing
from .selection_problem import RECENT, SINKS, Problem, check, check_sticky_steps
from .test_residency import Resident, random_selection

pytestmark = [needs_compiler, pytest.mark.skipif(not missing(), reason="the kernels themselves run here")]
CLUSTER = 8
MOST = 1e-3  # that scores of two selections may differ by


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
@pytest.mark.parametrize(
    ("n_slots", "k_max"), [(64, 64), (150, 100), (2500, 1300), (12000, 9000), (70000, 17000)]
)
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


def problem_on_cpu(lengths, capacity, budgets):
    return Problem(lengths, capacity, budgets, device="cpu")


def select(problem, history=None, new_rows=0, attended=True, backwards=False):
    sticky, (tokens, counts) = history is not None, problem.empty_selection()
    tokens.fill_(77)
    counts.fill_(77)
    labels = {"CHANNELS": 32, "BITS": 4, "GROUP": 4, "STEPS": 2, "PREFETCH": 1}
    defines = labels | {"THREADS": 512, "CLUSTER": CLUSTER, "RESIDENT": 2, "STICKY": int(sticky)}
    sources = ("label_scores.h", "cluster_topk.cuh", "select_cluster.cu")
    library = build("select_cluster", tuple(defines.items()), sources)
    label_tensors = (problem.query_labels, problem.offsets, problem.codes, problem.scales)
    past = history if sticky else problem.codes
    pointers = (*label_tensors, problem.budgets, problem.lengths, past, tokens, counts)
    batch, kv_heads, capacity = problem.shape
    numbers = (kv_heads, capacity, past.shape[-1], SINKS, RECENT, new_rows, attended, problem.k_max)
    launch(library, kv_heads, batch, *pointers, *numbers, backwards=backwards)
    return tokens, counts


@pytest.mark.parametrize("backwards", [False, True])
def test_exact_selection(backwards):
    problem = problem_on_cpu([5000, 3001, 70, 1], 5008, [700, 3000, 16, 16])
    expected, scores = problem.empty_selection(), problem.scores()
    select_topk_reference(scores, problem.budgets, problem.lengths, SINKS, RECENT, *expected)
    check(*select(problem, backwards=backwards), *expected, scores, MOST)


@pytest.mark.parametrize("scale", [0.0, 0.01, 300.0])
def test_scores_that_hardly_differ_or_lie_outside_the_bins(scale):
    problem = problem_on_cpu([4000], 4000, [600])
    problem.query_labels *= scale
    expected, scores = problem.empty_selection(), problem.scores()
    select_topk_reference(scores, problem.budgets, problem.lengths, SINKS, RECENT, *expected)
    tokens, counts = select(problem)
    check(tokens, counts, *expected, scores, MOST)
    if scale == 0:
        assert tokens[0, 0].tolist() == list(range(SINKS, SINKS + 600))


@pytest.mark.parametrize("new_rows", [0, 40, 5000])
def test_sticky_selection_and_its_history(new_rows):
    problem = problem_on_cpu([5003, 3000, 100], 5003, [400, 256, 50])

    def run(history, new_rows, attended, step):
        return select(problem, history, new_rows, attended, backwards=attended and step % 2 == 1)

    check_sticky_steps(problem, run, new_rows, 5, MOST)
