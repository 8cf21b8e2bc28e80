"""The plan: byte counts against tensors that exist, and the searches for what fits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from offload_runtime.calibration import Calibration
from offload_runtime.config import DEFAULT_LABEL_CHANNELS, RuntimeConfig
from offload_runtime.errors import RunError, UserError
from offload_runtime.fitting import fit
from offload_runtime.input_guess import Guesses, guess_rank
from offload_runtime.memory import FreeMemory, measure
from offload_runtime.model_check import check_config, check_label_channels, position_warning
from offload_runtime.planner import Plan, largest, make_plan, require
from offload_runtime.session import Session
from offload_runtime.weights import Weights, count_weights

from .eight_b import GB, LLAMA_8B, PLENTY
from .models import identity_calibration, offloaded, random_ids, random_llama


def test_weights_match_a_real_model() -> None:
    model = random_llama()
    counted = count_weights(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.active == counted.total


def test_llama_8b() -> None:
    """Published: 8.03 billion parameters; 34.4 GB of KV rows at 262,144 tokens (131,072 bytes a token)."""
    plan = make_plan(RuntimeConfig(), LLAMA_8B, PLENTY, "cuda")
    assert plan.needs.weights == 8030261248 * 2
    assert plan.needs.pinned == 262144 * 131072
    assert plan.needs.labels == 32 * 8 * 262144 * (32 // 2 + 4)
    assert plan.fits


def test_mixture_of_experts_counts_active_parameters() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    weights = count_weights(config)
    expert = 3 * 64 * 128
    assert weights.total - weights.active == 2 * 6 * expert  # 2 layers, 6 of 8 experts idle
    assert weights.stacked == 2 * 8 * expert  # which bitsandbytes and torchao do not pack
    packed = weights.quantised(4.5)
    assert packed.bytes_in(torch.bfloat16) == packed.kept * 2 + int((weights.total - packed.kept) * 4.5 / 8)
    assert packed.kept - weights.kept == weights.stacked


def test_packed_weights_are_unpacked_one_at_a_time() -> None:
    """bitsandbytes 0.50 multiplies more than 1,536 tokens with a 16-bit copy of the whole matrix."""
    plain = count_weights(LLAMA_8B)
    packed = plain.quantised(4.5)
    assert plain.unpacked_bytes_in(torch.bfloat16) == 0
    assert packed.unpacked_bytes_in(torch.bfloat16) == 4096 * 14336 * 2
    needs = [
        make_plan(RuntimeConfig(), LLAMA_8B, PLENTY, "cuda", weights=weights).needs
        for weights in (plain, packed)
    ]
    assert needs[1].prefill - needs[0].prefill == needs[1].question - needs[0].question == 4096 * 14336 * 2


def test_caches_take_what_the_plan_says() -> None:
    model = random_llama()
    from offload_runtime.adapter import ModelAdapter

    config = RuntimeConfig(ctx=2048, budget=64, label_channels=16)
    plan = make_plan(config, model.config, PLENTY, "cpu", tokens=1500, batch=2)
    session = Session(ModelAdapter(model), config, identity_calibration(model), 2, config.capacity(1500))
    assert session.layout == plan.layout
    host = sum(cache.host.rows.nbytes for cache in session.caches)
    labels = sum(cache.labels.codes.nbytes + cache.labels.scales.nbytes for cache in session.caches)
    slots = sum(cache.resident.slots.nbytes for cache in session.caches)
    assert (host, labels, slots) == (plan.needs.pinned, plan.needs.labels, plan.needs.slots)


def test_largest_is_the_last_that_fits() -> None:
    assert largest(lambda n: n <= 37, 1, 1000) == 37
    assert largest(lambda n: True, 1, 1000) == 1000
    assert largest(lambda n: False, 1, 1000) == 0


@pytest.mark.parametrize("free", [FreeMemory(GB * 400, GB * 22), FreeMemory(GB * 20, GB * 80)])
def test_what_is_offered_fits_and_one_more_does_not(free: FreeMemory) -> None:
    weights = count_weights(LLAMA_8B)
    config = RuntimeConfig()
    plan = make_plan(config, LLAMA_8B, free, "cuda", weights=weights)
    assert not plan.fits

    def fits(trial: RuntimeConfig) -> bool:
        return make_plan(trial, LLAMA_8B, free, "cuda", weights=weights).fits

    assert fits(replace(config, ctx=plan.largest_ctx))
    assert not fits(replace(config, ctx=plan.largest_ctx + 1))
    fitting = make_plan(replace(config, ctx=16384), LLAMA_8B, free, "cuda", weights=weights)
    batches = [make_plan(replace(config, ctx=16384), LLAMA_8B, free, "cuda", weights=weights, batch=b).fits
               for b in (fitting.largest_batch, fitting.largest_batch + 1)]  # fmt: skip
    assert batches == [True, False]
    with pytest.raises(RunError, match=rf"--ctx {plan.largest_ctx} ") as refusal:
        require(plan)
    assert "\n" not in str(refusal.value)


def test_nothing_fits() -> None:
    plan = make_plan(RuntimeConfig(), LLAMA_8B, FreeMemory(GB * 400, GB), "cuda")
    with pytest.raises(RunError, match="no context fits"):
        require(plan)


def test_places_keep_their_slots_while_one_prefills() -> None:
    """A batch's slots give way to a whole prefill; with continuous batching both are there at a time."""
    weights, config = count_weights(LLAMA_8B), RuntimeConfig(ctx=131072)
    together, places = (make_plan(config, LLAMA_8B, PLENTY, "cuda", batch=4, weights=weights, continuous=each)
                        for each in (False, True))  # fmt: skip
    n = places.needs
    assert n.device == n.lasting + n.slots + n.prefill
    assert n.device > together.needs.device
    assert places.needs.pinned == together.needs.pinned


def test_a_decode_step_reads_one_row_of_the_embedding() -> None:
    weights = count_weights(LLAMA_8B)
    assert weights.embedding == 128256 * 4096
    assert weights.read_bytes_in(torch.bfloat16) == 2 * (8030261248 - weights.embedding)
    assert weights.multiplied == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    tied = LlamaConfig.from_dict({**LLAMA_8B.to_dict(), "tie_word_embeddings": True, "num_hidden_layers": 1})
    assert count_weights(tied).embedding == 0


def test_trained_positions_follow_the_scaling() -> None:
    def positions(**rope: object) -> int:
        config = LlamaConfig(max_position_embeddings=32768, rope_parameters={"rope_theta": 1e6, **rope})
        return check_config(config).trained_positions

    assert positions(rope_type="default") == 32768
    assert positions(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768) == 131072


def test_position_warning_and_label_channels() -> None:
    shape = check_config(LLAMA_8B)
    assert position_warning(131072, shape) is None
    assert "--rope-scaling" in str(position_warning(131073, shape))
    check_label_channels(None, shape)
    check_label_channels(128, shape)
    with pytest.raises(UserError, match="head_dim is 128"):
        check_label_channels(129, shape)


def test_dtype_defaults_as_loading_does() -> None:
    assert make_plan(RuntimeConfig(), LLAMA_8B, PLENTY, "cuda").layout.dtype == torch.bfloat16
    assert make_plan(RuntimeConfig(), LLAMA_8B, PLENTY, "cpu").layout.dtype == torch.float32


def test_rows_on_the_gpu_where_they_fit() -> None:
    """33 GB of rows: an H100 that is empty holds them beside the weights, one of 40 GB does not."""
    config = RuntimeConfig(placement="auto")
    roomy = make_plan(config, LLAMA_8B, FreeMemory(GB * 400, GB * 79), "cuda")
    assert (roomy.placement, roomy.needs.pinned) == ("gpu", 0)
    assert roomy.needs.rows == 262144 * 131072
    assert (
        roomy.needs.device
        == make_plan(RuntimeConfig(), LLAMA_8B, PLENTY, "cuda").needs.device + roomy.needs.rows
    )
    tight = make_plan(config, LLAMA_8B, FreeMemory(GB * 400, GB * 40), "cuda")
    assert (tight.placement, tight.needs.rows, tight.fits) == ("host", 0, True)
    assert make_plan(config, LLAMA_8B, FreeMemory(GB * 400, None), "cuda").placement == "host"
    assert make_plan(config, LLAMA_8B, PLENTY, "cpu").placement == "host"
    forced = make_plan(RuntimeConfig(placement="gpu"), LLAMA_8B, FreeMemory(GB * 400, GB * 40), "cuda")
    with pytest.raises(RunError, match="of GPU memory"):
        require(forced)


def plans_on(gpu_bytes: int, device: str = "cuda") -> Callable[[RuntimeConfig], Plan]:
    weights, free = count_weights(LLAMA_8B), FreeMemory(GB * 400, gpu_bytes)
    return lambda config: make_plan(config, LLAMA_8B, free, device, weights=weights)


def test_fit_shrinks_in_order() -> None:
    """Each step is taken only when the one before it was not enough, and the result fits."""
    config = RuntimeConfig(label_bits=8, budget="1/4", chunk_tokens=512)  # slots take more than prefill
    whole = make_plan(config, LLAMA_8B, PLENTY, "cuda").needs.device
    slots = 32 * 8 * 512  # bytes of one slot in every layer and KV head
    few_slots = make_plan(replace(config, slots=1), LLAMA_8B, PLENTY, "cuda").needs.device
    low_bits = make_plan(replace(config, slots=1, label_bits=4), LLAMA_8B, PLENTY, "cuda").needs.device
    cases = [
        (whole + 5 * GB, 0),
        (few_slots + 100 * slots, 1),
        (low_bits + slots, 2),
        (low_bits - 1000 * slots, 3),
    ]
    for gpu_bytes, steps in cases:
        plan_of = plans_on(gpu_bytes)
        fitted, notes = fit(config, plan_of)
        assert plan_of(fitted).fits
        assert [note.split()[0] for note in notes] == ["slots", "label", "budget"][:steps]
        assert not any("\n" in note for note in notes)
    assert fit(config, plans_on(few_slots + 100 * slots))[0].label_bits == 8
    fitted, _ = fit(config, plans_on(low_bits - 1000 * slots))
    assert 64 <= int(fitted.budget) < 65536
    assert not plans_on(low_bits - 1000 * slots)(replace(fitted, budget=int(fitted.budget) + 1)).fits


def test_chunks_shrink_before_anything_else() -> None:
    """262,144 tokens of the 8B shape on a card of 24 GiB: at 1/16 as well as at 2,048 rows."""
    for budget in ("1/16", 2048):
        plan = make_plan(RuntimeConfig(budget=budget), LLAMA_8B, FreeMemory(GB * 400, 24 << 30), "cuda")
        assert plan.fits
    config = RuntimeConfig(budget=2048)
    roomy = make_plan(config, LLAMA_8B, PLENTY, "cuda")
    assert roomy.chunk_tokens == 4096
    assert roomy.needs.lasting - roomy.needs.weights - roomy.needs.reserve + roomy.needs.prefill < 6 << 30
    tight = make_plan(config, LLAMA_8B, FreeMemory(GB * 400, roomy.needs.device - 1), "cuda")
    assert (tight.fits, tight.chunk_tokens) == (True, 2048)
    assert fit(config, plans_on(roomy.needs.device - 1)) == (config, [])
    chosen = make_plan(replace(config, chunk_tokens=4096), LLAMA_8B, tight.free, "cuda")
    assert (chosen.fits, chosen.chunk_tokens) == (False, 4096)


def test_fit_refuses_what_no_setting_helps() -> None:
    with pytest.raises(RunError, match="no context fits"):
        fit(RuntimeConfig(), plans_on(GB))
    weights, short = count_weights(LLAMA_8B), FreeMemory(GB * 20, GB * 80)
    with pytest.raises(RunError, match="of host memory"):
        fit(RuntimeConfig(), lambda config: make_plan(config, LLAMA_8B, short, "cuda", weights=weights))


def test_generate_refuses_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_runtime import fitting

    monkeypatch.setattr(fitting, "measure", lambda _: FreeMemory(10**6))
    runtime = offloaded(random_llama())
    with pytest.raises(RunError, match="of host memory"):
        runtime.generate(random_ids(300), max_new_tokens=2)
    assert runtime._session is None


def test_generate_fits_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from offload_runtime import fitting

    runtime = offloaded(random_llama(), slots=900, budget=100, fit=True)
    asked = RuntimeConfig(ctx=4096, sinks=4, recent=16, chunk_tokens=64, slots=900, budget=100)
    adapter = runtime.adapter

    def host_bytes(config: RuntimeConfig) -> int:
        plan = make_plan(
            config,
            adapter.model.config,
            PLENTY,
            "cpu",
            tokens=1024,
            dtype=torch.float32,
            weights=Weights(0, 0),
        )
        return plan.host_bytes

    monkeypatch.setattr(fitting, "measure", lambda _: FreeMemory(host_bytes(replace(asked, slots=500))))
    with pytest.warns(UserWarning, match="slots lowered from 900 to 500"):
        runtime.generate(random_ids(300), max_new_tokens=2, do_sample=False)
    assert runtime._session is not None
    assert runtime._session.layout.slots == 500
    assert runtime.stats["placement"] == "host"
    assert len(runtime.stats["fitted"]) == 1


def test_from_pretrained_refuses_before_it_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There are no weights to load in this directory: the refusal comes first."""
    from offload_runtime import OffloadedModel, fitting

    LLAMA_8B.save_pretrained(tmp_path)
    monkeypatch.setattr(fitting, "measure", lambda _: FreeMemory(GB * 16))
    with pytest.raises(RunError, match=r"of host memory.*no context fits"):
        OffloadedModel.from_pretrained(tmp_path, device="cpu", ctx=1024)


@pytest.mark.gpu
def test_a_memory_limit_counts() -> None:
    """PyTorch's own limit is what is free, and a session beyond it is refused in one line."""
    whole = measure("cuda").gpu
    assert whole is not None
    limit = 1e9 / torch.cuda.get_device_properties(0).total_memory  # the caches below need 2 GB
    runtime = offloaded(random_llama(device="cuda"), ctx=200_000, budget="1/1")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        assert (measure("cuda").gpu or 0) <= 1e9 < whole
        with pytest.raises(RunError, match="of GPU memory") as refusal:
            runtime.generate(random_ids(190_000, device="cuda"), max_new_tokens=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(refusal.value)


def guessing_calibration(model: LlamaForCausalLM) -> Calibration:
    """In host memory, of the default R, with a guess for every layer but the first."""
    config = model.config
    layers, width = config.num_hidden_layers, config.hidden_size
    rank = guess_rank(width)
    up = torch.full((layers, width, rank), 1e-3)
    up[0] = 0
    guesses = Guesses(torch.zeros(layers, width), torch.zeros(layers, rank, width), up)
    return replace(identity_calibration(model, DEFAULT_LABEL_CHANNELS), guesses=guesses)


@pytest.mark.gpu
def test_planned_against_measured_bytes_on_a_gpu() -> None:
    """Peak of prefill and of decode within 5 % of the plan, at a shape where everything in it shows."""
    from offload_runtime import OffloadedModel
    from offload_runtime.stats import CUBLAS_BYTES

    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 1000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 70000}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, dtype="bfloat16")).bfloat16()
    ids = torch.randint(3, 1000, (1, 65_000), device="cuda")
    config = RuntimeConfig(ctx=65_536)
    plan = make_plan(config, model.config, PLENTY, "cuda", tokens=65_004, dtype=torch.bfloat16)
    with OffloadedModel(model, config) as runtime:
        runtime.calibration = guessing_calibration(model)
        runtime.generate(ids, max_new_tokens=4, do_sample=False)
        pinned = sum(cache.host.rows.nbytes for cache in runtime._session.offloaded.values())
    n, s = plan.needs, runtime.stats
    assert pinned == n.pinned
    lasting = n.lasting - n.reserve
    assert s["gpu_prefill_peak_gb"] * GB == pytest.approx(lasting + n.prefill + CUBLAS_BYTES // 3, rel=0.05)
    assert s["gpu_decode_peak_gb"] * GB == pytest.approx(lasting + n.slots + CUBLAS_BYTES, rel=0.05)
