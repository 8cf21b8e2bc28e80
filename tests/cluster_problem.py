"""Labels and queries for the cluster kernel's tests, and whether it can run here."""

import importlib.util

import pytest
import torch

from offload_runtime.kernels.labels import quantise
from offload_runtime.kernels.scores import label_scores_reference
from offload_runtime.kernels.select_cluster import select_by_labels_cluster

SINKS, RECENT = 4, 64


def missing() -> str:
    """Why the kernel cannot run here; empty if it can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy (the extra cuda12 or cuda13)"
    if torch.cuda.get_device_capability()[0] < 9:
        return "needs thread block clusters (sm_90)"
    return ""


needs_clusters = pytest.mark.skipif(bool(missing()), reason=missing() or "runs")


class Problem:
    """Random labels and queries on the GPU; label cache entries past the lengths are NaN or 255."""

    def __init__(self, lengths, capacity, budgets, kv_heads=2, group=4, channels=32, bits=4, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device="cuda")

        batch = len(lengths)
        self.query_labels = normal(batch, kv_heads * group, channels) * 0.3
        self.offsets = normal(batch, kv_heads * group) * 2 + 10
        labels = normal(batch, kv_heads, capacity, channels) * 2 + normal(channels)
        scales = torch.full((batch, kv_heads, capacity, 2), float("nan"), device="cuda").half()
        codes = labels.half()
        if bits != 16:
            codes, scales = quantise(labels, bits)
        for b, length in enumerate(lengths):
            codes[b, :, length:] = float("nan") if bits == 16 else 255
            scales[b, :, length:] = float("nan")
        self.codes, self.scales, self.bits = codes.contiguous(), scales.contiguous(), bits
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.budgets = torch.tensor(budgets, dtype=torch.int32, device="cuda")
        self.shape = (batch, kv_heads, capacity)
        self.k_max = max(budgets)

    def empty_selection(self):
        batch, kv_heads, _ = self.shape
        tokens = torch.full((batch, kv_heads, self.k_max), -1, dtype=torch.int32, device="cuda")
        return tokens, torch.zeros(batch, dtype=torch.int32, device="cuda")

    def scores(self):
        scores = torch.empty(self.shape, device="cuda")
        label_scores_reference(
            self.query_labels, self.offsets, self.codes, self.scales, self.bits, self.lengths,
            SINKS, RECENT, scores,
        )  # fmt: skip
        return scores

    def run(self, tokens, counts, previous_tokens=None, new_rows=0):
        select_by_labels_cluster(
            self.query_labels, self.offsets, self.codes, self.scales, self.bits, self.budgets, self.lengths,
            SINKS, RECENT, tokens, counts, previous_tokens, new_rows,
        )  # fmt: skip
