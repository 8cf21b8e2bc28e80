"""bench.row_bits: how far roundings move numbers, and that a session reads what they leave."""

import pytest
import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.row_bits import ROUNDINGS, compare

from .models import random_ids, random_llama


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("exact", 0.0),
        ("e4m3", 2**-4),  # three bits behind the first, rounded
        ("e4m3, a scale a key or value", 2**-4),
        ("int8, a scale a key or value", 0.5 / 127),
        ("int8, a scale for 32 numbers", 0.5 / 127),
        ("int4, a scale for 32 numbers", 0.5 / 7),
    ],
)
def test_no_number_moves_by_more_than_its_format_allows(name, most):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 8
    moved = (ROUNDINGS[name](x) - x).abs()
    assert (moved.amax(-1) <= most * x.abs().amax(-1) * 1.0001).all()
    assert moved.any() == (name != "exact")


def test_what_every_rounding_costs():
    rows = compare(ModelAdapter(random_llama()), random_ids(700)[0], 700)
    assert [row["rows"] for row in rows] == list(ROUNDINGS)
    losses = {row["rows"]: row["kl"] for row in rows}
    assert losses["exact"] == 0
    assert losses["int4, a scale for 32 numbers"] > losses["int8, a scale for 32 numbers"] >= 0
    assert all(0 < row["same_best_token"] <= 1 for row in rows)
