"""Memory contracts: nothing S x S in prefill, nothing S x Hq x D in decode, bytes as planned."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload_runtime.prefill_memory import staging_rows

from .models import identity_calibration, offloaded, random_ids, random_llama

TOKENS, CHUNK = 1500, 64


class LargestResult(TorchDispatchMode):
    """Remembers the most elements that any op's new result had; views and in-place results are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {item.untyped_storage().data_ptr() for item in args if isinstance(item, torch.Tensor)}
        for item in result if isinstance(result, tuple | list) else [result]:
            fresh = isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() not in given
            if fresh:
                self.elements = max(self.elements, item.numel())
        return result


def test_prefill_makes_nothing_of_size_s_by_s():
    model = random_llama()
    runtime = offloaded(model, budget=24, chunk_tokens=CHUNK, ctx=TOKENS + 8)
    runtime.calibration = identity_calibration(model)
    with LargestResult() as seen:
        runtime.generate(random_ids(TOKENS), max_new_tokens=1, do_sample=False)
    heads = model.config.num_attention_heads
    assert seen.elements < TOKENS * TOKENS
    chunk_logits, one_layers_rows = heads * CHUNK * TOKENS, 2 * 2 * 64 * staging_rows(TOKENS + 8)
    assert seen.elements <= max(chunk_logits, one_layers_rows)


def test_decode_makes_nothing_of_size_s_by_heads_by_dim():
    model = random_llama()
    runtime = offloaded(model, budget=24, ctx=TOKENS + 64)
    ids = runtime.generate(random_ids(TOKENS), max_new_tokens=2, do_sample=False)
    with LargestResult() as seen:
        runtime._session.step(ids[:, -1])
    assert seen.elements < TOKENS * model.config.num_attention_heads * model.config.head_dim / 4


def size(*holders):
    """Bytes of tensors, tuples of them and objects that have them."""
    total = 0
    for holder in holders:
        if isinstance(holder, torch.Tensor):
            total += holder.numel() * holder.element_size()
        else:
            total += size(*(holder if isinstance(holder, tuple) else vars(holder).values()))
    return total


@pytest.mark.parametrize("new_rows", [None, 3])
def test_allocated_bytes_equal_the_layout(new_rows):
    runtime = offloaded(random_llama(), budget=24, new_rows=new_rows)
    runtime.generate(random_ids(300), max_new_tokens=2, do_sample=False)
    session = runtime._session
    layout, cache = session.layout, session.caches[0]
    resident = cache.resident
    assert size(cache.host.rows) == layout.host_bytes
    assert size(cache.labels.codes, cache.labels.scales) == layout.label_bytes
    assert size(resident.slots) == layout.slot_bytes
    assert size(resident.slot_of_token, resident.token_in_slot, resident.stamps) == layout.map_bytes
    assert (0 if cache.history is None else size(cache.history)) == (layout.history_bytes if new_rows else 0)
    shared = session.prefetcher
    scratch = size(shared.work, *shared.side_works, shared.selection, *shared.predictions)
    assert scratch == layout.workspace_bytes + (layout.sticky_workspace_bytes if new_rows else 0)
