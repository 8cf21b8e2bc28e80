"""Label maps learned from attention itself, beginning with the projection.

The projection makes the mean square error of q.k' least over all keys alike, and a selection
needs the few with large softmax mass. So both maps go down the gradient of
    - sum_t p_t log softmax(label scores)_t,
the cross entropy of every query head's exact attention p and of what its labels give, over the tokens
that can be selected (neither sinks nor recent). Each query head gets a query map of its own. The last
document is not learned from: the maps kept are those that select most mass on it, so never worse
ones there than the projection's. (The loss itself judges badly: it rises on some layers whose selection
gets better.)

Documents are spread over all positions by gaps, as longer ones would reach them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .adapter import AttentionCall, ModelAdapter
from .calibration_collect import attend, grouped_products
from .calibration_mass import RECENT, SINKS
from .errors import UserError

SHARE = 16  # maps are judged by a selection of N/16, the paper's budget
# One is judged by. Length matters: R = 16, two layers of tiny-256k, far mass found in 8,192 tokens of
# another text: 0.76 by the projection, 0.79 after documents of 4,096 tokens, 0.83 after 8,192. So does their
# number: on a text with look-ups (bench/lookup_text.py) R = 16 finds 0.75 and 0.76 of the far mass of pass
# key and line questions after five documents and 200 steps, 0.77 and 0.81 after twelve and 600. Their keys
# take 6.4 GB of host memory for 32 layers of 8 KV heads (arithmetic).
DOCUMENTS, DOCUMENT_TOKENS = 12, 8192
QUERIES = 64  # of a document, spread over its last quarter, where most is to be chosen from
QUERIES_A_STEP = 24
STRETCH = 512  # tokens without a gap between them
# tiny-256k, R = 16: 200 steps of Adam at 5e-4 find 0.859 of the far mass of four layers on another text,
# 400 steps 0.858; 1e-3 a hundredth less, 1e-2 loses a quarter of what is gained.
STEPS, RATE, CHECK_EVERY = 600, 5e-4, 60

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query_map [Hq, R, D], key_map [Hkv, R, D], key_mean


@dataclass(frozen=True)
class Sample:
    """One layer's keys [Hkv, T, D] of a document and some of its queries [Hq, P, D], the last token of
    each one's lengths [P]."""

    queries: torch.Tensor
    keys: torch.Tensor
    lengths: torch.Tensor
    scale: float

    def on(self, device: torch.device) -> "Sample":
        queries, keys = self.queries.to(device).float(), self.keys.to(device).float()
        return Sample(queries, keys, self.lengths.to(device), self.scale)

    def selectable(self) -> torch.Tensor:
        """[P, T]: the tokens that are neither sinks nor recent."""
        token = torch.arange(self.keys.shape[1], device=self.keys.device)
        return (token >= SINKS) & (token < self.lengths[:, None] - RECENT)

    def mass(self) -> torch.Tensor:
        """Softmax mass [Hkv, G, P, T] of the selectable tokens; zero elsewhere."""
        token = torch.arange(self.keys.shape[1], device=self.keys.device)
        logits = grouped_products(self.queries, self.keys) * self.scale
        attention = logits.masked_fill(token >= self.lengths[:, None], float("-inf")).softmax(-1)
        return attention * self.selectable()


def spread_positions(tokens: int, span: int, generator: torch.Generator) -> torch.Tensor:
    """Positions [tokens] that reach `span` by gaps of random size between stretches of STRETCH tokens."""
    stretch = torch.arange(tokens) // STRETCH
    ends = torch.rand(int(stretch[-1]) + 1, generator=generator).cumsum(0)
    share = (ends - ends[0]) / (ends[-1] - ends[0]).clamp_min(1e-9)
    return torch.arange(tokens) + (share * max(0, span - tokens))[stretch].long()


@torch.no_grad()
def sample_document(
    adapter: ModelAdapter, document: torch.Tensor, positions: torch.Tensor
) -> list[Sample | None]:
    """Samples of one document [T] by layer, in host memory; None for a layer with a sliding window."""
    samples: list[Sample | None] = []
    places = torch.linspace(len(document) * 3 // 4, len(document) - 1, QUERIES).long()

    def handle(call: AttentionCall) -> torch.Tensor:
        parts = (call.query[0, :, places.to(call.query.device)].cpu(), call.key[0].cpu())
        samples.append(None if call.window else Sample(*parts, places + 1, call.scale))
        return attend(call)

    device = adapter.device
    with adapter.handled_by([handle] * len(adapter.layers)):
        ids, places_of_tokens = document.to(device)[None], positions.to(device)[None]
        adapter.base(input_ids=ids, position_ids=places_of_tokens, use_cache=False)
    return samples


def learn(
    adapter: ModelAdapter,
    maps: Sequence[Maps],
    documents: Sequence[torch.Tensor],
    positions: int,
    seed: int,
    progress: Callable[[int], None],
) -> list[Maps]:
    """Better maps of every layer, from documents [T] spread over `positions`; progress(layers done).

    UserError when there are not two documents, one of them to judge by, or one has too little to select from.
    """
    least = 4 * (SINKS + RECENT)
    if len(documents) < 2 or min(map(len, documents)) < least:
        raise UserError(
            f"method learned needs two stretches of {least} tokens of text at least; give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    sampled = [
        sample_document(adapter, document, spread_positions(len(document), positions, generator))
        for document in documents
    ]
    better = []
    for index, layer in enumerate(zip(*sampled, strict=True)):
        seen = [sample.on(adapter.device) for sample in layer if sample is not None]
        better.append(learn_layer(seen, maps[index], generator) if seen else maps[index])
        progress(index + 1)
    return better


def learn_layer(samples: Sequence[Sample], maps: Maps, generator: torch.Generator) -> Maps:
    """One layer's maps, learned from all samples but the last, on the samples' device."""
    device = samples[0].keys.device
    query_map, key_map, mean = (part.to(device, torch.float32, copy=True) for part in maps)
    masses, last = [sample.mass() for sample in samples], len(samples) - 1
    trained = [query_map.requires_grad_(), key_map.requires_grad_()]
    with torch.enable_grad():
        optimiser = torch.optim.Adam(trained, lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        best, kept = judge(samples[last], masses[last], query_map, key_map, mean), maps
        for step in range(STEPS):
            some = torch.randperm(QUERIES, generator=generator)[:QUERIES_A_STEP].to(device)
            at = step % last
            optimiser.zero_grad()
            loss_of(samples[at], masses[at], some, query_map, key_map, mean).backward()
            optimiser.step()
            schedule.step()
            if (step + 1) % CHECK_EVERY == 0:
                missed = judge(samples[last], masses[last], query_map, key_map, mean)
                if missed < best:
                    found = (query_map.detach().clone(), key_map.detach().clone(), mean)
                    best, kept = missed, found
    return kept


def judge(
    sample: Sample, mass: torch.Tensor, query_map: torch.Tensor, key_map: torch.Tensor, mean: torch.Tensor
) -> float:
    """Part of the mass [Hkv, G, P, T] that a selection of N/16 tokens by these maps misses."""
    every = torch.arange(QUERIES, device=mass.device)
    with torch.no_grad():
        shares = shares_of(sample, every, query_map, key_map, mean).exp().sum(1)  # [Hkv, P, T]
        found = mass.new_zeros(())
        for p, length in enumerate(sample.lengths.tolist()):
            far = slice(SINKS, length - RECENT)
            chosen = shares[:, p, far].topk(max(1, length // SHARE)).indices  # [Hkv, K]
            found += mass[:, :, p, far].sum(1).gather(1, chosen).sum()
        return float(1 - found / mass.sum())


def shares_of(
    sample: Sample,
    some: torch.Tensor,
    query_map: torch.Tensor,
    key_map: torch.Tensor,
    mean: torch.Tensor,
) -> torch.Tensor:
    """Log of the labels' softmax [Hkv, G, P, T] over selectable tokens, of queries `some`; -inf elsewhere."""
    query_labels = sample.queries[:, some] @ query_map.mT  # [Hq, P, R]
    labels = (sample.keys - mean[:, None]) @ key_map.mT  # [Hkv, T, R]
    scores = grouped_products(query_labels, labels) * sample.scale
    return scores.masked_fill(~sample.selectable()[some], float("-inf")).log_softmax(-1)


def loss_of(
    sample: Sample,
    mass: torch.Tensor,
    some: torch.Tensor,
    query_map: torch.Tensor,
    key_map: torch.Tensor,
    mean: torch.Tensor,
) -> torch.Tensor:
    """Cross entropy of the labels' softmax over selectable tokens; mass [Hkv, G, P, T], of queries `some`."""
    shares = shares_of(sample, some, query_map, key_map, mean)
    weight = mass[:, :, some]
    return -(weight * shares.masked_fill(shares.isneginf(), 0.0)).sum() / weight.sum()
