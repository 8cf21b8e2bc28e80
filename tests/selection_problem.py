"""Labels and queries to select by, and how a cluster kernel's selections have to agree with the reference."""

import torch

from offload_runtime.kernels.history import empty_history
from offload_runtime.kernels.labels import quantise
from offload_runtime.kernels.scores import label_scores_reference

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
