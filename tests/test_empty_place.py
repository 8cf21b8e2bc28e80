"""A place of length 0: every kernel passes over it, and its neighbour comes out as without it."""

import pytest
import torch

from offload_runtime.kernels.admission import empty_candidates
from offload_runtime.kernels.admit_cluster import admit_in_clusters, choose_in_clusters
from offload_runtime.kernels.append import append_rows_reference, append_rows_triton
from offload_runtime.kernels.history import empty_history
from offload_runtime.kernels.labels import code_width, make_labels_reference, make_labels_triton
from offload_runtime.kernels.query_labels import query_labels_reference, query_labels_triton
from offload_runtime.kernels.scores import label_scores_reference, label_scores_triton
from offload_runtime.kernels.select_cluster import cluster_select_available, select_by_labels_cluster
from offload_runtime.kernels.sparse_decode import sparse_attention_reference, sparse_attention_triton
from offload_runtime.kernels.sticky import sticky_topk_reference, sticky_topk_triton
from offload_runtime.kernels.topk import select_topk_reference, select_topk_triton

from .test_residency import Resident

SINKS, RECENT, SLOTS, CAPACITY, DIM, CHANNELS, BUDGET = 4, 16, 32, 256, 64, 16, 24
LENGTHS = [0, 200, 0]


def draw(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def lengths_on(device: str) -> torch.Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32, device=device)


@pytest.mark.parametrize("run", [append_rows_reference, append_rows_triton])
def test_nothing_is_appended(run, device):
    key, value = draw(3, 2, DIM, device=device), draw(3, 2, DIM, device=device)
    slots = torch.full((3, 2, SINKS + RECENT + SLOTS, 2 * DIM), float("nan"), device=device)
    host = torch.full((3, 2, CAPACITY, 2 * DIM), float("nan"))
    host = host.pin_memory() if device == "cuda" else host
    run(key, value, lengths_on(device), slots, SINKS, RECENT, host)
    for rows in (slots, host):
        assert rows[[0, 2]].isnan().all()
        assert (~rows[1].isnan()).any(-1).sum() == 2  # one row a KV head


@pytest.mark.parametrize("run", [make_labels_reference, make_labels_triton])
@pytest.mark.parametrize("bits", [4, 16])
def test_nothing_is_labelled(run, bits, device):
    kind = torch.float16 if bits == 16 else torch.uint8
    codes = torch.full((3, 2, CAPACITY, code_width(CHANNELS, bits)), 77, dtype=kind, device=device)
    scales = torch.full((3, 2, CAPACITY, 2), 77, dtype=torch.float16, device=device)
    maps = draw(2, CHANNELS, DIM, device=device), draw(2, DIM, device=device)
    run(draw(3, 2, 1, DIM, device=device), *maps, lengths_on(device) - 1, codes, scales, bits)
    assert (codes[[0, 2]] == 77).all()
    assert (scales[[0, 2]] == 77).all()
    assert (codes[1, :, 199] != 77).any()


@pytest.mark.parametrize("include_current", [True, False])
def test_query_labels_and_scores_stay_finite_where_they_are_read(device, include_current):
    slots = torch.full((3, 2, SINKS + RECENT + SLOTS, 2 * DIM), float("nan"), device=device)
    slots[1] = draw(*slots.shape[1:], device=device)
    arguments = (
        draw(3, 4, DIM, device=device), draw(4, CHANNELS, DIM, device=device), draw(2, DIM, device=device),
        slots, lengths_on(device), SINKS, RECENT, 0.1, include_current,
    )  # fmt: skip
    both = [run(*arguments) for run in (query_labels_reference, query_labels_triton)]
    for expected, got in zip(*both, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    codes = draw(3, 2, CAPACITY, CHANNELS, device=device).half()
    scales = torch.empty(3, 2, 0, 2, dtype=torch.float16, device=device)
    for run in (label_scores_reference, label_scores_triton):
        scores = torch.full((3, 2, CAPACITY), 5.0, device=device)
        run(*both[1], codes, scales, 16, lengths_on(device), SINKS, RECENT, scores)
        assert torch.isfinite(scores[1, :, SINKS : 200 - RECENT]).all()


@pytest.mark.parametrize("kind", ["exact", "sticky"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_nothing_is_selected(kind, on_gpu, device):
    scores = torch.full((3, 2, CAPACITY), float("nan"), device=device)
    scores[1] = draw(2, CAPACITY, device=device)
    tokens = torch.full((3, 2, BUDGET), 9, dtype=torch.int32, device=device)
    counts = torch.full((3, 2), 9, dtype=torch.int32, device=device)
    budgets = torch.tensor([[0] * 2, [BUDGET] * 2, [0] * 2], dtype=torch.int32, device=device)
    if kind == "exact":
        run = select_topk_triton if on_gpu else select_topk_reference
        run(scores, budgets, lengths_on(device), SINKS, RECENT, tokens, counts)
    else:
        run = sticky_topk_triton if on_gpu else sticky_topk_reference
        history = empty_history(3, 2, CAPACITY, device)
        run(scores, budgets, 3, lengths_on(device), SINKS, RECENT, history, True, tokens, counts)
        assert not history[[0, 2]].any()
    assert counts.tolist() == [[0] * 2, [BUDGET] * 2, [0] * 2]
    assert (tokens[[0, 2]] == -1).all()
    assert (tokens[1] >= SINKS).all()


@pytest.mark.gpu
@pytest.mark.parametrize("sticky", [False, True])
def test_the_cluster_kernel_selects_nothing(sticky):
    if not cluster_select_available(torch.device("cuda"), CAPACITY):
        pytest.skip("needs CuPy and sm_90")
    labels, offsets = draw(3, 4, CHANNELS, device="cuda"), draw(3, 4, device="cuda")
    codes = draw(3, 2, CAPACITY, CHANNELS, device="cuda").half()
    scales = torch.empty(3, 2, 0, 2, dtype=torch.float16, device="cuda")
    tokens = torch.full((3, 2, BUDGET), 9, dtype=torch.int32, device="cuda")
    counts = torch.full((3, 2), 9, dtype=torch.int32, device="cuda")
    budgets = torch.tensor([[0] * 2, [BUDGET] * 2, [0] * 2], dtype=torch.int32, device="cuda")
    fixed, lengths = (SINKS, RECENT), lengths_on("cuda")
    arguments = (labels, offsets, codes, scales, 16, budgets)
    if sticky:
        history = empty_history(3, 2, CAPACITY, "cuda")
        candidates = empty_candidates(3, 2, 2 * BUDGET, "cuda")
        entering = torch.full_like(tokens, 9), torch.full_like(counts, 9)
        resident = Resident.empty(3, 2, CAPACITY, 2 * BUDGET, BUDGET, "cuda")
        step, lists = torch.ones(1, dtype=torch.int32, device="cuda"), (history, True, *entering, candidates)
        slots = (resident.maps, step, 1, 8, resident.misses)
        admit_in_clusters(*arguments, 3, lengths, *fixed, *lists, *slots)
        assert resident.miss_counts.tolist() == [[0] * 2, [BUDGET] * 2, [0] * 2]
        stamps = (resident.slot_of_token, resident.stamps, step, 1, resident.counters)
        choose_in_clusters(
            candidates, budgets, SINKS, history, True, tokens, counts, torch.empty_like(tokens), *stamps
        )
        assert entering[1].tolist() == candidates.counts.tolist() == counts.tolist()
    else:
        select_by_labels_cluster(*arguments, lengths, *fixed, tokens, counts)
    assert counts.tolist() == [[0] * 2, [BUDGET] * 2, [0] * 2]
    assert (tokens[[0, 2]] == -1).all()


@pytest.mark.parametrize("run", [sparse_attention_reference, sparse_attention_triton])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_is_zero_and_the_neighbour_is_untouched(run, sinks, device):
    slots = torch.full((3, 2, SINKS + RECENT + SLOTS, 2 * DIM), float("nan"), device=device)
    slots[1] = draw(*slots.shape[1:], device=device)
    tokens = torch.arange(BUDGET, dtype=torch.int32, device=device).expand(3, 2, -1).contiguous() + SINKS
    counts = torch.tensor([[0] * 2, [BUDGET] * 2, [0] * 2], dtype=torch.int32, device=device)
    places = torch.arange(CAPACITY, dtype=torch.int32, device=device).expand(3, 2, -1).contiguous() % SLOTS
    query, logits = draw(3, 4, DIM, device=device), draw(4, device=device) if sinks else None

    def attend(span: slice) -> torch.Tensor:
        state = (tokens[span], counts[span], places[span], lengths_on(device)[span])
        return run(query[span], slots[span], *state, SINKS, RECENT, 0.1, 0.0, logits)

    out = attend(slice(0, 3))
    assert (out[[0, 2]] == 0).all()
    torch.testing.assert_close(out[1], attend(slice(1, 2))[0], rtol=1e-5, atol=1e-6)
