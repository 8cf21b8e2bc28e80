"""Order comes from events: a late copy stream changes nothing but time."""

import pytest
import torch

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.calibration import Calibration
from offload_runtime.demo import shipped_prose
from offload_runtime.model_check import embedded_model
from offload_runtime.prefetch.row_writer import RowWriter
from offload_runtime.session import Session

from .models import identity_calibration, logits_of, offloaded, random_ids, random_llama

DELAY_CYCLES = 2_000_000  # about a millisecond a layer, many times what a layer of these models takes
STEPS = 12
LONG_TOKENS = 100_000


def delayed(model, **settings):
    """An OffloadedModel whose every prediction and gather is held back."""
    runtime = offloaded(model, **settings)

    def open_delayed(config: RuntimeConfig, calibration: Calibration, batch: int, capacity: int) -> Session:
        return Session(runtime.adapter, config, calibration, batch, capacity, DELAY_CYCLES)

    runtime._new_session = open_delayed
    return runtime


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("prefetch", ["correct", "predict"])
@pytest.mark.parametrize("new_rows", [None, 5])
def test_a_late_copy_stream_changes_no_bit(poisoned, cuda_graph, prefetch, new_rows):
    model, ids = random_llama(device="cuda", layers=4), random_ids(500, device="cuda")
    settings = {
        "budget": 24,
        "slots": 40,
        "prefetch": prefetch,
        "new_rows": new_rows,
        "cuda_graph": cuda_graph,
    }
    punctual, tardy = offloaded(model, **settings), delayed(model, **settings)
    for runtime in (punctual, tardy):  # all layers but the first are predicted, badly
        runtime.calibration = identity_calibration(model)
    ids_on_time, on_time = logits_of(punctual.generate, ids, STEPS)
    ids_late, late = logits_of(tardy.generate, ids, STEPS)
    assert torch.equal(ids_on_time, ids_late)
    assert torch.equal(on_time, late)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", ["1/16", 2048])
def test_a_long_prompt_gives_the_same_bits_every_time(budget):
    """With the slots freed for the prefill and the kernels of long caches: `off` twice, then `correct`."""
    text = (shipped_prose() * 2)[:LONG_TOKENS]
    runs = []
    for prefetch in ("off", "off", "correct"):
        settings = {"ctx": LONG_TOKENS + 64, "budget": budget, "prefetch": prefetch}
        with OffloadedModel.from_pretrained(embedded_model(), device="cuda", **settings) as runtime:
            ids = runtime.tokenizer(text, return_tensors="pt").input_ids
            runs.append(logits_of(runtime.generate, ids, STEPS, eos_token_id=None)[1].cpu())
    assert torch.equal(runs[0][0], runs[1][0])  # the prefill's
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.gpu
def test_graph_and_plain_steps_agree():
    model, ids = random_llama(device="cuda"), random_ids(500, device="cuda")
    _, plain = logits_of(offloaded(model, budget=24, cuda_graph=False).generate, ids, STEPS)
    _, replayed = logits_of(offloaded(model, budget=24, cuda_graph=True).generate, ids, STEPS)
    assert torch.equal(plain, replayed)


@pytest.mark.gpu
def test_staging_rows_are_not_overwritten_before_their_copy():
    """The next layer's rows go into the same buffer; the copy of the old ones must come first."""
    writer = RowWriter(torch.device("cuda"))
    staged = torch.empty(2, 4096, 256, device="cuda")
    host = torch.empty(staged.shape, pin_memory=True)
    staged.fill_(1.0)
    with torch.cuda.stream(writer.stream):
        torch.cuda._sleep(20 * DELAY_CYCLES)  # the copy starts late
    writer.write(staged, host, 0)
    writer.before_reuse(0)
    staged.fill_(2.0)
    writer.finish()
    torch.cuda.synchronize()
    assert bool((host == 1.0).all())


@pytest.mark.gpu
def test_bfloat16_full_budget_is_within_the_noise_of_dense():
    """The yardstick is the model's own bf16 noise: SDPA against eager attention."""
    model, ids = random_llama(device="cuda", dtype=torch.bfloat16), random_ids(700, device="cuda")
    _, sdpa = logits_of(model.generate, ids, 1)
    _, ours = logits_of(offloaded(model, budget="1/1").generate, ids, 1)
    model.set_attn_implementation("eager")
    _, eager = logits_of(model.generate, ids, 1)
    noise = (sdpa - eager).abs().max()
    assert noise > 0
    assert (ours - sdpa).abs().max() <= 4 * noise
