"""Learned maps: better than the projection on text they did not see, never worse where they are judged."""

import pytest
import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.calibrate_command import calibrate
from offload_runtime.calibration import Calibration
from offload_runtime.calibration_learned import (
    QUERIES,
    Sample,
    judge,
    learn,
    learn_layer,
    sample_document,
    spread_positions,
)
from offload_runtime.calibration_maps import calibrate_layer
from offload_runtime.errors import UserError

from .tiny_model import save_tiny_llama, tiny_llama

TOKENS, RANK, DIM = 640, 8, 16


def text_like(seed: int) -> Sample:
    """Two KV heads of two query heads: strong directions of no use, and weaker ones that queries pick."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, DIM, DIM, generator=torch.Generator().manual_seed(7))).Q
    sizes = torch.cat([torch.full((4,), 3.0), torch.full((12,), 1.0)])
    keys = (torch.randn(2, TOKENS, DIM, generator=g) * sizes) @ basis
    lengths = torch.linspace(TOKENS // 4, TOKENS, QUERIES).long()
    wanted = torch.stack([torch.randint(16, int(n) - 63, (4,), generator=g) for n in lengths], 1)  # [Hq, P]
    weak = keys.view(2, TOKENS, DIM) @ basis.mT * (sizes == 1) @ basis  # what tells the keys apart
    picked = torch.stack([weak[head // 2, wanted[head].clamp_max(TOKENS - 1)] for head in range(4)])
    common = (torch.randn(4, QUERIES, DIM, generator=g) * (sizes == 3)).view(2, 2, QUERIES, DIM)
    queries = picked + (common @ basis[:, None]).flatten(0, 1) * 0.5  # [Hq, P, D]
    return Sample(queries, keys, lengths, 1.0)


def missed(sample: Sample, maps) -> float:
    return judge(sample, sample.mass(), *maps)


def test_learned_maps_find_more_on_text_they_did_not_see():
    samples, other = [text_like(seed) for seed in range(3)], text_like(9)
    start = calibrate_layer(samples[0].queries, samples[0].keys[:, :QUERIES], RANK)
    learned = learn_layer(samples, start, torch.Generator().manual_seed(0))
    assert missed(samples[-1], learned) < missed(samples[-1], start)
    assert missed(other, learned) < missed(other, start)
    assert [part.shape for part in learned] == [part.shape for part in start]


def test_exact_maps_are_kept():
    """With R = D there is nothing to gain but fit to noise, which the judged document does not confirm."""
    samples = [text_like(seed) for seed in range(2)]
    eye = torch.eye(DIM)
    start = (eye.expand(4, -1, -1), eye.expand(2, -1, -1), torch.zeros(2, DIM))
    learned = learn_layer(samples, start, torch.Generator().manual_seed(0))
    assert missed(samples[-1], learned) <= missed(samples[-1], start)


def test_mass_is_the_softmax_over_all_visible_tokens():
    sample = text_like(0)
    mass = sample.mass()  # [Hkv, G, P, T]
    query, place = sample.queries[3, 5], int(sample.lengths[5])
    expected = (sample.keys[1, :place] @ query).softmax(0)
    expected[:16], expected[place - 64 :] = 0, 0
    torch.testing.assert_close(mass[1, 1, 5, :place], expected)
    assert not mass[1, 1, 5, place:].any()


def test_positions_rise_to_the_span():
    places = spread_positions(2048, 100_000, torch.Generator().manual_seed(0))
    assert int(places[0]) == 0
    assert bool((places.diff() >= 1).all())
    assert 90_000 < int(places[-1]) < 100_000


def test_a_model_is_sampled_and_learned_from():
    adapter = ModelAdapter(tiny_llama())
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randint(3, 100, (400,), generator=g) for _ in range(2)]
    samples = sample_document(adapter, blocks[0], torch.arange(400))
    assert len(samples) == len(adapter.layers)
    maps = [calibrate_layer(s.queries, s.keys[:, :QUERIES], RANK) for s in samples]
    done = []
    learned, again = (learn(adapter, maps, blocks, 4096, 0, done.append) for _ in range(2))
    assert done == [1, 2, 3] * 2
    for one, other in zip(learned, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_block_is_too_little():
    with pytest.raises(UserError, match="two stretches of 320 tokens"):
        learn(ModelAdapter(tiny_llama()), [], [torch.zeros(4096, dtype=torch.long)], 8192, 0, print)


def test_the_command_writes_learned_maps(tmp_path):
    model = save_tiny_llama(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(160)))  # some 800 byte tokens
    paths = [
        calibrate(model, [text], method, 8, tmp_path / method, device="cpu")
        for method in ("projection", "learned")
    ]
    projection, learned = map(Calibration.load, paths)
    assert learned.provenance["method"] == "learned"
    assert learned.query_map.shape == projection.query_map.shape
    assert not torch.equal(learned.query_map, projection.query_map)
    text.write_text(text.read_text()[:500])
    with pytest.raises(UserError, match="two stretches of 320 tokens"):
        calibrate(model, [text], "learned", 8, tmp_path / "none", device="cpu")
    assert not (tmp_path / "none").exists()
