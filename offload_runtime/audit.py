"""Audit: every N-th decode step, what sparse attention left out, by exact attention over all host rows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .adapter import AttentionCall
from .cache.layer_cache import LayerCache
from .cache.selection import Selection
from .cache.window_cache import WindowCache

ROW_BLOCK = 32768  # tokens brought to the GPU at a time: 134 MB at 8 KV heads of 128 in 16 bits


class Audit:
    """Watches the attention of every `every`-th step of a session; costs nothing on the others.

    Sums and largest values by layer, over steps: relative error of the attention
    output, |sparse - dense| / |dense| over all heads, and missed mass, the mean share
    of the softmax on tokens that were not attended to. With budget 1/1 the error is
    what the model's dtype rounds off, the missed mass 0.
    """

    def __init__(self, every: int, caches: Sequence[LayerCache | WindowCache], device: torch.device) -> None:
        self.every, self.caches, self.device = every, caches, device
        self.clear()

    def clear(self) -> None:
        self.fed, self.steps, self.seconds, self.active = 0, 0, 0.0, False
        # [layers, error or missed mass, sum or largest]
        self.seen = torch.zeros(len(self.caches), 2, 2, dtype=torch.float64, device=self.device)

    def due(self) -> bool:
        """Count a step and say whether it is one to audit."""
        self.fed += 1
        return self.fed % self.every == 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """For the time of one step, whose cost is measured."""
        self._wait()
        started = time.perf_counter()
        self.active = True
        try:
            yield
        finally:
            self.active = False
        self._wait()
        self.seconds += time.perf_counter() - started
        self.steps += 1

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def look(
        self, index: int, query: torch.Tensor, selection: Selection, call: AttentionCall, out: torch.Tensor
    ) -> None:
        """Compare one layer's output [B, Hq, D] of the query [B, Hq, D] with exact attention."""
        cache = self.caches[index]
        assert isinstance(cache, LayerCache)
        missed, exact = [], torch.empty_like(out, dtype=torch.float32)
        for b, length in enumerate(cache.state.lengths.tolist()):
            rows = cache.host.link_rows[b, :, :length]
            exact[b], logits, lse = dense_attention(
                query[b], rows, call.scale, call.softcap, call.sink_logits
            )
            share = (logits - lse[:, None]).exp().unflatten(0, (rows.shape[0], -1)).mean(1)  # [Hkv, T]
            missed.append((share * ~attended(cache, selection, b, length)).sum(-1).mean())
        error = (out.float() - exact).norm() / exact.norm()
        now = torch.stack([error, torch.stack(missed).mean()]).double()  # [2]
        self.seen[index, :, 0] += now
        self.seen[index, :, 1] = torch.maximum(self.seen[index, :, 1], now)

    def figures(self) -> dict[str, Any]:
        """Means and largest values by layer (None: a sliding layer, which is exact); empty before a look."""
        if not self.steps:
            return {"every": self.every, "steps": 0, "seconds": 0.0, "layers": []}
        layers: list[dict[str, float] | None] = []
        for cache, ((error, worst), (missed, most)) in zip(self.caches, self.seen.tolist(), strict=True):
            values = (error / self.steps, worst, missed / self.steps, most)
            names = ("relative_error", "relative_error_max", "missed_mass", "missed_mass_max")
            layers.append(dict(zip(names, values, strict=True)) if isinstance(cache, LayerCache) else None)
        looked_at = [layer for layer in layers if layer is not None]
        means = {
            name: sum(layer[name] for layer in looked_at) / max(1, len(looked_at))
            for name in ("relative_error", "missed_mass")
        }
        return {"every": self.every, "steps": self.steps, "seconds": self.seconds, **means, "layers": layers}


def attended(cache: LayerCache, selection: Selection, sequence: int, length: int) -> torch.Tensor:
    """Which of a sequence's tokens a step attended to: [Hkv, length] bool."""
    resident, kv_heads = cache.resident, selection.tokens.shape[1]
    mask = torch.zeros(kv_heads, length + 1, dtype=torch.bool, device=selection.tokens.device)
    mask[:, : resident.sinks] = True
    mask[:, max(0, length - resident.recent) :] = True
    chosen = selection.tokens[sequence].long()  # [Hkv, K], -1 past a head's count
    return mask.scatter_(1, chosen.where(chosen >= 0, length), True)[:, :length]


def dense_attention(
    query: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact attention of one token's query [Hq, D] over host rows [Hkv, T, 2 D], block by block.

    Returns, in float32 on the query's device, out [Hq, D], logits [Hq, T] and the
    logarithm of the softmax's normaliser [Hq].
    """
    (heads, dim), (kv_heads, tokens, _) = query.shape, rows.shape
    q = query.float().view(kv_heads, -1, dim) * scale  # [Hkv, G, D]
    logits = torch.empty(kv_heads, q.shape[1], tokens, device=query.device)
    best = q.new_full((*q.shape[:2], 1), float("-inf"))
    if sink_logits is not None:
        best = sink_logits.float().view(*best.shape)
    mass, total = torch.full_like(best, float(sink_logits is not None)), torch.zeros_like(q)
    for start in range(0, tokens, ROW_BLOCK):
        block = to_device(rows[:, start : start + ROW_BLOCK], query.device)  # [Hkv, block, 2 D]
        part = q @ block[..., :dim].mT  # [Hkv, G, block]
        if softcap:
            part = softcap * torch.tanh(part / softcap)
        logits[..., start : start + part.shape[-1]] = part
        higher = torch.maximum(best, part.amax(-1, keepdim=True))
        weights, shrink = (part - higher).exp(), (best - higher).exp()
        mass = mass * shrink + weights.sum(-1, keepdim=True)
        total = total * shrink + weights @ block[..., dim:]
        best = higher
    lse = (best + mass.log()).view(heads)
    return (total / mass).view(heads, dim), logits.view(heads, tokens), lse


def to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A block of host rows [Hkv, T, row] as float32; head by head, since only those are contiguous."""
    return torch.stack([head.to(device, non_blocking=True) for head in rows]).float()


def audit_summary(figures: dict[str, Any]) -> str:
    """One line for people."""
    if not figures["steps"]:
        return f"audit: no step was the {figures['every']}th; lower --audit"
    layers = [(i, layer) for i, layer in enumerate(figures["layers"]) if layer is not None]
    worst, most = max(layers, key=lambda pair: pair[1]["relative_error"])
    return (
        f"audit of {figures['steps']} steps: attention output off by {100 * figures['relative_error']:.2f} % "
        f"(layer {worst}: {100 * most['relative_error']:.2f} %), {100 * figures['missed_mass']:.2f} % of the "
        f"attention mass missed; cost {1e3 * figures['seconds'] / figures['steps']:.1f} ms an audited step"
    )
