"""The bulk-copy gather against gather_rows_reference, bit for bit, and what it must leave alone."""

import pytest
import torch

from offload_runtime.kernels.gather import gather_rows, gather_rows_reference
from offload_runtime.kernels.gather_bulk import STAGE_BYTES, gather_bulk_available, gather_rows_bulk

from .hopper import needs_hopper

FIRST_SLOT, CAPACITY, BUDGET, N_SLOTS = 68, 5000, 1500, 1600


class Problem:
    """Random rows, miss lists that are garbage past their counts, and slots filled with NaN."""

    def __init__(self, batch, kv_heads, row_bytes, counts, pinned=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(batch, kv_heads, CAPACITY, row_bytes // 2, generator=generator).bfloat16()
        self.host_rows = rows.pin_memory() if pinned else rows.cuda()
        self.tokens = torch.full((batch, kv_heads, BUDGET), 10**8, dtype=torch.int32, device="cuda")
        self.places = self.tokens.clone()
        self.counts = torch.zeros(batch, kv_heads, dtype=torch.int32, device="cuda")
        slots = torch.empty(batch, kv_heads, FIRST_SLOT + N_SLOTS, row_bytes // 2, device="cuda")
        self.slots = slots.bfloat16().fill_(float("nan"))
        self.generator = generator
        self.draw(counts)

    def draw(self, counts):
        """New misses; counts: one a head, repeated as often as needed."""
        batch, kv_heads = self.counts.shape
        for head in range(batch * kv_heads):
            b, h, count = head // kv_heads, head % kv_heads, counts[head % len(counts)]
            chosen = torch.randperm(CAPACITY, generator=self.generator)[:count].sort().values
            places = torch.randperm(N_SLOTS, generator=self.generator)[:count]
            self.tokens[b, h, :count] = chosen.int().cuda()
            self.places[b, h, :count] = places.int().cuda()
            self.counts[b, h] = count

    def misses(self):
        return self.tokens, self.places, self.counts

    def expected(self):
        slots = self.slots.clone()
        gather_rows_reference(self.host_rows, *self.misses(), slots, FIRST_SLOT)
        return slots


def equal_bits(got, want):
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


def compare(problem, gather=gather_rows_bulk, **options):
    want = problem.expected()
    gather(problem.host_rows, *problem.misses(), problem.slots, FIRST_SLOT, **options)
    torch.cuda.synchronize()
    assert equal_bits(problem.slots, want)


RAGGED = [0, 1, 31, 32, 33, 1500, 0, 700]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "cuda"])
@pytest.mark.parametrize("row_bytes", [64, 128, 256, 320, 512, 1024, 4096])
@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 8), (4, 2)])
def test_moves_the_missed_rows_and_nothing_else(batch, kv_heads, row_bytes, pinned):
    compare(Problem(batch, kv_heads, row_bytes, RAGGED, pinned))


@pytest.mark.gpu
@needs_hopper
def test_no_misses_change_nothing():
    problem = Problem(1, 8, 512, [0])
    compare(problem)
    assert problem.slots.isnan().all()


@pytest.mark.gpu
@needs_hopper
def test_misses_of_a_few_of_many_heads():
    compare(Problem(4, 32, 128, [0] * 37 + [5] + [0] * 50 + [200]))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("ring_bytes", [1, 32 * 1024, 192 * 1024])
@pytest.mark.parametrize("num_ctas", [1, 4, 16])
def test_any_number_of_ctas_and_stages(num_ctas, ring_bytes):
    compare(Problem(1, 8, 512, RAGGED), num_ctas=num_ctas, ring_bytes=ring_bytes)


@pytest.mark.gpu
@needs_hopper
def test_gather_rows_takes_it():
    assert gather_bulk_available(torch.device("cuda", 0), 512)
    compare(Problem(1, 8, 512, RAGGED), gather=gather_rows)


@pytest.mark.gpu
@needs_hopper
def test_replays_in_a_cuda_graph_with_new_counts():
    problem = Problem(1, 8, 512, RAGGED)
    compare(problem)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather_rows_bulk(problem.host_rows, *problem.misses(), problem.slots, FIRST_SLOT)
    for counts in ([3], [0], [1500, 0, 0, 0], RAGGED):
        problem.draw(counts)
        problem.slots.fill_(float("nan"))
        want = problem.expected()
        graph.replay()
        torch.cuda.synchronize()
        assert equal_bits(problem.slots, want)


@pytest.mark.gpu
@needs_hopper
def test_the_next_kernel_sees_every_row():
    """A kernel right behind the gather on its stream reads what the gather wrote, 50 times over."""
    problem = Problem(1, 8, 512, [1500])
    want = problem.expected()
    seen = []
    for _ in range(50):
        problem.slots.fill_(float("nan"))
        gather_rows_bulk(problem.host_rows, *problem.misses(), problem.slots, FIRST_SLOT)
        seen.append((problem.slots.view(torch.int16) == want.view(torch.int16)).all())
    assert torch.stack(seen).all()


def test_not_available_without_a_gpu_or_for_odd_rows():
    assert not gather_bulk_available(torch.device("cpu"), 512)
    assert not gather_bulk_available(torch.device("cuda"), 48)
    assert not gather_bulk_available(torch.device("cuda"), 2 * STAGE_BYTES)
