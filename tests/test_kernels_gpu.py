"""What only a GPU can show: replay inside a CUDA graph with new lengths, and addresses past 2^31 elements."""

import pytest
import torch

from offload_runtime.kernels.append import append_rows, append_rows_reference
from offload_runtime.kernels.gather import gather_rows, gather_rows_reference
from offload_runtime.kernels.labels import make_labels, make_labels_reference
from offload_runtime.kernels.query_labels import query_labels, query_labels_reference
from offload_runtime.kernels.scores import label_scores, label_scores_reference
from offload_runtime.kernels.sparse_decode import sparse_attention, sparse_attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SINKS, RECENT, BUDGET, N = 4, 64, 128, 4096
GPU = (append_rows, gather_rows, make_labels, query_labels, label_scores, sparse_attention)
REFERENCE = (
    append_rows_reference,
    gather_rows_reference,
    make_labels_reference,
    query_labels_reference,
    label_scores_reference,
    sparse_attention_reference,
)


class Step:
    """The buffers of one decode step of one layer, and the step itself with either set of ops."""

    def __init__(self):
        torch.manual_seed(0)
        heads, group, dim, channels = 2, 4, 128, 32
        self.first_slot = SINKS + RECENT
        self.host_rows = torch.randn(1, heads, N, 2 * dim).bfloat16().pin_memory()
        self.slots = torch.randn(1, heads, self.first_slot + BUDGET, 2 * dim, device="cuda").bfloat16()
        self.codes = torch.zeros(1, heads, N, channels // 2, dtype=torch.uint8, device="cuda")
        self.scales = torch.ones(1, heads, N, 2, dtype=torch.float16, device="cuda")
        self.scores = torch.zeros(1, heads, N, device="cuda")
        self.key, self.value = torch.randn(2, 1, heads, dim, device="cuda").bfloat16()
        self.query = torch.randn(1, heads * group, dim, device="cuda").bfloat16()
        self.key_map = torch.randn(heads, channels, dim, device="cuda") / dim**0.5
        self.query_map = torch.randn(heads * group, channels, dim, device="cuda") / dim**0.5
        self.key_mean = torch.randn(heads, dim, device="cuda")
        self.lengths = torch.ones(1, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(1, heads, dtype=torch.int32, device="cuda")
        self.tokens = torch.zeros(1, heads, BUDGET, dtype=torch.int32, device="cuda")
        self.places = torch.arange(BUDGET, dtype=torch.int32, device="cuda").expand(1, heads, -1).contiguous()
        self.slot_of_token = torch.zeros(1, heads, N, dtype=torch.int32, device="cuda")
        self.out = torch.zeros_like(self.query)

    def select(self, length: int, seed: int) -> None:
        """Put a new length and a new selection of it into the buffers."""
        count = max(0, min(BUDGET, length - RECENT - SINKS))
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(max(length - RECENT - SINKS, 1), generator=generator)[:count].sort().values
        chosen = (chosen + SINKS).int().cuda()
        self.lengths.fill_(length)
        self.counts.fill_(count)
        self.tokens[:, :, :count] = chosen
        self.slot_of_token[:, :, chosen.long()] = self.places[:, :, :count]

    def run(self, ops) -> None:
        append, gather, make, project, score, attend = ops
        append(self.key, self.value, self.lengths, self.slots, SINKS, RECENT, self.host_rows)
        make(self.key[:, :, None], self.key_map, self.key_mean, self.lengths - 1, self.codes, self.scales, 4)
        scale = 128**-0.5
        ql, offsets = project(
            self.query, self.query_map, self.key_mean, self.slots, self.lengths, SINKS, RECENT, scale, True
        )
        score(ql, offsets, self.codes, self.scales, 4, self.lengths, SINKS, RECENT, self.scores)
        gather(self.host_rows, self.tokens, self.places, self.counts, self.slots, self.first_slot)
        selection = (self.tokens, self.counts, self.slot_of_token)
        self.out.copy_(attend(self.query, self.slots, *selection, self.lengths, SINKS, RECENT, scale))


def test_one_graph_serves_every_length():
    """Captured at one length, replayed at others; each time equal to the references run eagerly."""
    got, want = Step(), Step()
    got.select(500, seed=0)
    got.run(GPU)  # compile before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got.run(GPU)
    want.select(500, seed=0)
    want.run(REFERENCE)
    for seed, length in enumerate([1, 70, 501, 4096], start=1):
        got.select(length, seed)
        want.select(length, seed)
        graph.replay()
        torch.cuda.synchronize()
        want.run(REFERENCE)
        assert torch.equal(got.slots, want.slots)
        assert torch.equal(got.host_rows, want.host_rows)
        span = slice(SINKS, max(SINKS, length - RECENT))
        torch.testing.assert_close(got.scores[..., span], want.scores[..., span], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got.out, want.out, rtol=3e-2, atol=2e-2)


@pytest.mark.slow
def test_rows_past_two_to_the_31_elements():
    capacity, dim = 2**23 + 64, 128  # 2^31 elements = 2^23 rows of 256
    host_rows = torch.zeros(1, 1, capacity, 2 * dim, dtype=torch.bfloat16, pin_memory=True)
    host_rows[0, 0, -40:] = torch.randn(40, 2 * dim).bfloat16()
    slots = torch.zeros(1, 1, SINKS + RECENT + 40, 2 * dim, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 1, 1, dim, device="cuda").bfloat16()
    lengths = torch.tensor([capacity], dtype=torch.int32, device="cuda")
    append_rows(key, value, lengths, slots, SINKS, RECENT, host_rows)
    tokens = torch.arange(capacity - 40, capacity, dtype=torch.int32, device="cuda").view(1, 1, 40)
    places = torch.arange(40, dtype=torch.int32, device="cuda").view(1, 1, 40)
    counts = torch.tensor([[40]], dtype=torch.int32, device="cuda")
    gather_rows(host_rows, tokens, places, counts, slots, SINKS + RECENT)
    torch.cuda.synchronize()
    assert torch.equal(host_rows[0, 0, -1], torch.cat([key, value], -1)[0, 0].cpu())
    assert torch.equal(slots[0, 0, SINKS + RECENT :].cpu(), host_rows[0, 0, -40:])
