"""Selecting and resolving in thread block clusters, emulated on the CPU, against the references."""

import pytest
import torch

from offload_runtime.kernels.residency import resolve_reference
from offload_runtime.kernels.topk import select_topk_reference

from .admission_problem import SHORTER, check_equal_scores, check_shorter, check_sticky_steps
from .cuda_on_cpu import build, launch, needs_compiler
from .hopper import missing
from .selection_problem import RECENT, SINKS, Problem, check
from .test_residency import Resident, random_selection, selections_in_parts

pytestmark = [needs_compiler, pytest.mark.skipif(not missing(), reason="the kernels themselves run here")]
CLUSTER = 8
CTAS = {"THREADS": 512, "CLUSTER": CLUSTER}
MOST = 1e-3  # that scores of two selections may differ by


def kernel(name, sources, defines):
    return build(name, tuple((CTAS | defines).items()), (*sources, f"{name}.cu"))


def resolve_emulated(backwards):
    def run(
        tokens, counts, slot_of_token, token_in_slot, stamps, hand, step, phase, attended, kept_steps, part,
        miss_tokens, miss_slots, miss_counts, counters,
    ):  # fmt: skip
        library = kernel("resolve_cluster", ("order_key.cuh", "resolve_list.cuh"), {})
        batch, kv_heads, k_max = tokens.shape
        tensors = (tokens, counts, slot_of_token, token_in_slot, stamps, hand, step)
        written = (miss_tokens, miss_slots, miss_counts, counters)
        sizes = (kv_heads, k_max, slot_of_token.shape[-1], token_in_slot.shape[-1])
        numbers = (*sizes, phase, attended, kept_steps, part)
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


def test_resolve_in_two_parts():
    generator = torch.Generator().manual_seed(3)
    reference, emulated = (Resident.empty(2, 2, 3000, 1500, 1000, "cpu") for _ in range(2))
    for tokens, counts, step, phase, attended, part in selections_in_parts(generator, 3000, 1000, 3, "cpu"):
        reference.resolve(resolve_reference, tokens, counts, step, phase, attended, 8, part)
        emulated.resolve(resolve_emulated(attended), tokens, counts, step, phase, attended, 8, part)
        for name, expected in vars(reference).items():
            assert torch.equal(getattr(emulated, name), expected), (name, part)


def problem_on_cpu(lengths, capacity, budgets):
    return Problem(lengths, capacity, budgets, device="cpu")


LABELS = {"CHANNELS": 32, "BITS": 4, "GROUP": 4, "STEPS": 2, "RESIDENT_THREADS": 1024}
SCORING = ("order_key.cuh", "label_scores.h", "cluster_topk.cuh", "score_tokens.cuh")


def select(problem, backwards=False):
    tokens, counts = problem.empty_selection()
    tokens.fill_(77)
    counts.fill_(77)
    batch, kv_heads, capacity = problem.shape
    tensors = (*problem.labels, problem.budgets, problem.lengths, tokens, counts)
    numbers = (kv_heads, capacity, SINKS, RECENT, problem.k_max)
    library = kernel("select_cluster", SCORING, LABELS)
    launch(library, kv_heads, batch, *tensors, *numbers, backwards=backwards)
    return tokens, counts


def admit(backwards):
    """Runs like admit_in_clusters."""

    def run(
        query_labels, offsets, codes, scales, bits, budgets, new_rows, lengths, sinks, recent, history,
        attended, entering, entering_counts, candidates, slot_maps, step, phase, kept_steps, misses,
    ):  # fmt: skip
        (batch, kv_heads, capacity), k_max = codes.shape[:3], entering.shape[-1]
        labels, lists = (query_labels, offsets, codes, scales), (entering, entering_counts, *candidates)
        tensors = (*labels, budgets, lengths, history, *lists, *slot_maps, step, *misses)
        limits = (sinks, recent, new_rows, attended, k_max, candidates.tokens.shape[-1])
        slots = (slot_maps[1].shape[-1], phase, kept_steps)
        library = kernel("admit_cluster", (*SCORING, "member_bits.cuh", "resolve_list.cuh"), LABELS)
        numbers = (kv_heads, capacity, history.shape[-1], *limits, *slots)
        launch(library, kv_heads, batch, *tensors, *numbers, backwards=backwards)

    return run


def choose(backwards, ctas=CLUSTER):
    """Runs like choose_in_clusters."""

    def run(
        candidates, budgets, sinks, history, attended, tokens, counts, slots, slot_of_token, stamps, step,
        phase, counters,
    ):  # fmt: skip
        batch, kv_heads, k_max = tokens.shape
        lists = (tokens, counts, slots)
        tensors = (*candidates, budgets, history, *lists, slot_of_token, stamps, step, counters)
        sizes = (kv_heads, candidates.tokens.shape[-1], history.shape[-1], sinks, attended, k_max)
        sources = ("order_key.cuh", "cluster_topk.cuh", "resolve_list.cuh")
        library = kernel("choose_cluster", sources, {"CLUSTER": ctas})
        numbers = (*sizes, slot_of_token.shape[-1], stamps.shape[-2], phase)
        launch(library, kv_heads, batch, *tensors, *numbers, backwards=backwards)

    return run


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
    runs = (admit(False), choose(True)), (admit(True), choose(False, ctas=4))
    check_sticky_steps(problem, lambda step, attended: runs[step % 2 and attended], new_rows, 5, MOST)


def test_a_sequence_that_became_shorter_and_a_head_without_budget():
    """What the history holds past the end neither counts nor changes."""
    check_shorter(problem_on_cpu(*SHORTER), admit(False))


@pytest.mark.parametrize("ctas", [4, CLUSTER])
def test_choosing_among_equal_scores_and_all_there_are(ctas):
    check_equal_scores(problem_on_cpu([3000, 800], 3000, [[700, 1], [600, 0]]), choose(False, ctas))
