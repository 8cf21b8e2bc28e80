"""Resolving selections against the resident set: the GPU kernels have the bits of the reference."""

from dataclasses import dataclass

import pytest
import torch

from offload_runtime.kernels.cuda_source import runs_hopper_source
from offload_runtime.kernels.residency import (
    ENTERING,
    FROM_PREDICTION,
    REST,
    WHOLE,
    resolve,
    resolve_reference,
    resolve_triton,
)
from offload_runtime.kernels.resolve_cluster import resolve_in_clusters


@dataclass
class Resident:
    """One layer's maps, and what resolving writes."""

    slot_of_token: torch.Tensor
    token_in_slot: torch.Tensor
    stamps: torch.Tensor
    hand: torch.Tensor
    miss_tokens: torch.Tensor
    miss_slots: torch.Tensor
    miss_counts: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def empty(cls, batch, kv_heads, capacity, n_slots, k_max, device):
        def full(*shape, value):
            return torch.full(shape, value, dtype=torch.int32, device=device)

        return cls(
            full(batch, kv_heads, capacity, value=-1),
            full(batch, kv_heads, n_slots, value=-1),
            full(batch, kv_heads, n_slots, 2, value=-1),
            full(batch, kv_heads, value=0),
            full(batch, kv_heads, k_max, value=-9),
            full(batch, kv_heads, k_max, value=-9),
            full(batch, kv_heads, value=-9),
            torch.zeros(batch, 2, 4, dtype=torch.int64, device=device),
        )

    @property
    def maps(self):
        return self.slot_of_token, self.token_in_slot, self.stamps, self.hand

    @property
    def misses(self):
        return self.miss_tokens, self.miss_slots, self.miss_counts, self.counters

    def resolve(self, run, tokens, counts, step, phase, attended=None, kept_steps=0, part=WHOLE):
        attended = phase == 1 if attended is None else attended
        run(tokens, counts, *self.maps, step, phase, attended, kept_steps, part, *self.misses)


def random_selection(generator, batch, kv_heads, capacity, k_max, counts, device):
    """counts: of each sequence a number, or a list with a number for each KV head."""
    tokens = torch.full((batch, kv_heads, k_max), -1, dtype=torch.int32)
    per_head = torch.tensor(counts, dtype=torch.int32).view(batch, -1).expand(-1, kv_heads).contiguous()
    for b, row in enumerate(per_head.tolist()):
        for h, count in enumerate(row):
            tokens[b, h, :count] = torch.randperm(capacity, generator=generator)[:count].sort().values.int()
    return tokens.to(device), per_head.to(device)


def run_both(selections, batch, kv_heads, capacity, n_slots, k_max, device, kept_steps=0, attended=None):
    """Resolve the selections one after the other both ways; every tensor must agree each time."""
    reference = Resident.empty(batch, kv_heads, capacity, n_slots, k_max, device)
    kernels = (
        [resolve_triton, resolve_in_clusters]
        if runs_hopper_source(torch.device(device))
        else [resolve_triton]
    )
    residents = [Resident.empty(batch, kv_heads, capacity, n_slots, k_max, device) for _ in kernels]
    for i, (tokens, counts) in enumerate(selections):
        step = torch.tensor([5 + (i if attended else i // 2)], dtype=torch.int32, device=device)
        reference.resolve(resolve_reference, tokens, counts, step, i % 2, attended, kept_steps)
        for run, resident in zip(kernels, residents, strict=True):
            resident.resolve(run, tokens, counts, step, i % 2, attended, kept_steps)
            for name, expected in vars(reference).items():
                assert torch.equal(getattr(resident, name), expected), f"{run.__name__}: {name}, {i}"
    return residents[-1]


@pytest.mark.parametrize(
    ("capacity", "n_slots", "k_max"),
    [(500, 64, 64), (500, 100, 64), (3000, 2500, 1300), (300, 300, 300), (20, 1, 1)],
)
def test_random_selections(capacity, n_slots, k_max, device):
    generator = torch.Generator().manual_seed(capacity + n_slots)
    selections = [
        random_selection(generator, 2, 2, capacity, k_max, [k_max, max(1, k_max // (1 + i))], device)
        for i in range(6)
    ]
    run_both(selections, 2, 2, capacity, n_slots, k_max, device)


@pytest.mark.parametrize("n_slots", [64, 90, 200, 2500])
@pytest.mark.parametrize("kept_steps", [1, 3, 8])
@pytest.mark.parametrize("attended", [None, True])
def test_slots_of_the_last_steps(n_slots, kept_steps, attended, device):
    """With room for all that is to stay, and without."""
    generator = torch.Generator().manual_seed(n_slots + kept_steps)
    k_max = min(n_slots, 1000)
    selections = [
        random_selection(generator, 1, 2, 3000, k_max, [max(1, k_max // (1 + i % 5))], device)
        for i in range(8)
    ]
    run_both(selections, 1, 2, 3000, n_slots, k_max, device, kept_steps, attended)


def test_rows_attended_to_lately_stay_though_a_prediction_missed_them(device):
    """40 rows in 100 slots, 20 new ones a step, predictions wrong: the last two steps' rows are there."""
    generator = torch.Generator().manual_seed(8)
    kernel = Resident.empty(1, 1, 5000, 100, 40, device)
    everything = torch.randperm(5000, generator=generator).int()
    for number in range(1, 30):
        step = torch.tensor([number], dtype=torch.int32, device=device)
        wrong = everything[3000 + 20 * number :][:20].sort().values
        true = everything[20 * number :][:40].sort().values  # half of it new
        for phase, chosen in ((0, wrong), (1, true)):
            tokens = torch.full((1, 1, 40), -1, dtype=torch.int32)
            tokens[0, 0, : len(chosen)] = chosen
            counts = torch.full((1, 1), len(chosen), dtype=torch.int32)
            kernel.resolve(resolve, tokens.to(device), counts.to(device), step, phase, kept_steps=2)
        lately = everything[20 * max(number - 1, 1) : 20 * number + 40].long().to(device)
        assert (kernel.slot_of_token[0, 0, lately] >= 0).all()
        assert int(kernel.miss_counts) == (40 if number == 1 else 20)


def test_every_kv_head_has_its_own_count(device):
    generator = torch.Generator().manual_seed(6)
    counts = ([[50, 3], [0, 20]], [[10, 50], [50, 0]], [[1, 30], [49, 50]])
    selections = [random_selection(generator, 2, 2, 400, 50, c, device) for c in counts]
    kernel = run_both(selections, 2, 2, 400, 60, 50, device)
    assert kernel.counters[:, :, 0].tolist() == [[53 + 31, 60], [20 + 99, 50]]


def test_same_selection_again_is_all_hits(device):
    generator = torch.Generator().manual_seed(3)
    tokens, counts = random_selection(generator, 1, 2, 400, 50, [50], device)
    kernel = run_both([(tokens, counts), (tokens, counts)], 1, 2, 400, 50, 50, device)
    assert kernel.miss_counts.tolist() == [[0, 0]]
    assert kernel.counters.tolist() == [[[100, 0, 0, 100], [100, 100, 100, 100]]]


def test_empty_selection_changes_nothing(device):
    generator = torch.Generator().manual_seed(4)
    full = random_selection(generator, 1, 1, 400, 50, [50], device)
    empty = random_selection(generator, 1, 1, 400, 50, [0], device)
    kernel = run_both([full, empty, full], 1, 1, 400, 60, 50, device)
    assert kernel.counters[0, 0].tolist() == [100, 50, 0, 100]


def test_maps_stay_inverse_and_hold_the_selection(device):
    generator = torch.Generator().manual_seed(5)
    kernel = Resident.empty(1, 1, 2000, 700, 600, device)
    for i in range(5):
        tokens, counts = random_selection(generator, 1, 1, 2000, 600, [600 - 100 * i], device)
        step = torch.tensor([i], dtype=torch.int32, device=device)
        kernel.resolve(resolve, tokens, counts, step, 0)
        slots = kernel.slot_of_token[0, 0, tokens[0, 0, : int(counts)].long()]
        assert (slots >= 0).all()
        held = kernel.token_in_slot[0, 0]
        occupied = (held >= 0).nonzero().flatten()
        assert torch.equal(kernel.slot_of_token[0, 0, held[occupied].long()].long(), occupied)
        assert int((kernel.slot_of_token >= 0).sum()) == len(occupied)


def selections_in_parts(generator, capacity, k_max, steps, device):
    """What resolving is given: (tokens, counts, step, phase, attended, part), three lists a step."""
    for number in range(1, steps + 1):
        step = torch.tensor([number], dtype=torch.int32, device=device)
        few = [[k_max // 4, 0], [3, k_max // 8]]
        predicted = random_selection(generator, 2, 2, capacity, k_max, few, device)
        entering = random_selection(generator, 2, 2, capacity, k_max, few, device)
        entering[0][0, 0, : k_max // 8] = predicted[0][0, 0, : k_max // 8]  # half of what was predicted
        entering[0][0, 0, : k_max // 4] = entering[0][0, 0, : k_max // 4].sort().values
        chosen = random_selection(generator, 2, 2, capacity, k_max, [[k_max, 7], [9, k_max]], device)
        yield *predicted, step, 0, False, ENTERING
        yield *entering, step, 1, False, ENTERING
        yield *chosen, step, 1, True, REST


@pytest.mark.parametrize(("n_slots", "k_max"), [(64, 64), (150, 64), (2500, 800)])
def test_what_may_enter_and_then_the_selection(n_slots, k_max, device):
    generator = torch.Generator().manual_seed(n_slots)
    kernels = [resolve_triton]
    if runs_hopper_source(torch.device(device)):
        kernels.append(resolve_in_clusters)
    reference, *others = (Resident.empty(2, 2, 3 * k_max, n_slots, k_max, device) for _ in [0, *kernels])
    for given in selections_in_parts(generator, 3 * k_max, k_max, 4, device):
        tokens, counts, step, phase, attended, part = given
        before = reference.counters.clone()
        reference.resolve(resolve_reference, tokens, counts, step, phase, attended, 8, part)
        check_counted(reference, before, counts, phase, part)
        for run, resident in zip(kernels, others, strict=True):
            resident.resolve(run, tokens, counts, step, phase, attended, 8, part)
            for name, expected in vars(reference).items():
                assert torch.equal(getattr(resident, name), expected), f"{run.__name__}: {name}"
    assert (reference.counters[:, 1, FROM_PREDICTION] > 0).any()


def check_counted(resident, before, counts, phase, part):
    """SELECTED less HITS are the rows to fetch, whatever part, and a part's tokens are counted elsewhere."""
    selected, hits, _, wanted = (resident.counters - before)[:, phase].T
    listed = counts.sum(1)
    assert torch.equal(selected - hits, resident.miss_counts.sum(1))
    assert torch.equal(selected, listed * (part == WHOLE))
    assert torch.equal(wanted, listed * (part != REST))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("n_slots", "k_max"), [(2048, 2048), (4096, 2048), (18432, 16384), (32768, 32768)])
def test_256k_tokens(n_slots, k_max):
    generator = torch.Generator().manual_seed(6)
    selections = [
        random_selection(generator, 1, 8, 262144, k_max, [k_max - 37 * i], "cuda") for i in range(4)
    ]
    run_both(selections, 1, 8, 262144, n_slots, k_max, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_replays_in_a_cuda_graph():
    generator = torch.Generator().manual_seed(7)
    reference, kernel = (Resident.empty(1, 2, 5000, 600, 512, "cuda") for _ in range(2))
    tokens, counts = random_selection(generator, 1, 2, 5000, 512, [512], "cuda")
    step = torch.tensor([0], dtype=torch.int32, device="cuda")
    Resident.empty(1, 2, 5000, 600, 512, "cuda").resolve(resolve, tokens, counts, step, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.resolve(resolve, tokens, counts, step, 0)
    for i in range(1, 5):
        selection = random_selection(generator, 1, 2, 5000, 512, [512 - 100 * i], "cuda")
        tokens.copy_(selection[0])
        counts.copy_(selection[1])
        step.fill_(i)
        graph.replay()
        reference.resolve(resolve_reference, tokens, counts, step, 0)
        for name, expected in vars(reference).items():
            assert torch.equal(getattr(kernel, name), expected), name
