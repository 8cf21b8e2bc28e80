"""The whole prefill of a model with random weights: ours, transformers', snapshots, a small card, the plan.

Every part is a row of bench/rows.py. Time, memory and agreement, never quality.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.bench.prefill_profile import profiled
from offload_runtime.bench.rows import Rows
from offload_runtime.cli_plan import rates_here
from offload_runtime.engine import free_unused
from offload_runtime.hf_cache import CACHE_FIELD
from offload_runtime.memory import FreeMemory
from offload_runtime.planner import Needs, Plan, make_plan
from offload_runtime.speed import Traffic, predict
from offload_runtime.stats import CUBLAS_BYTES
from offload_runtime.weights import count_weights

GB = 1e9
QUESTION_TOKENS, ANSWER_TOKENS = 64, 8
SECONDS_256K = 45.0  # of our prefill at 262,144 tokens (the goal); shorter ones by the square, at least 3 s
SMALL_BUDGET = "2048"
EMPTY = FreeMemory(host=1 << 60, gpu=1 << 60)


class PrefillBench:
    """One model, one long text, and what its rows share."""

    def __init__(
        self, model: PreTrainedModel, contexts: list[int], budget: str, card_gb: float, rows: Rows
    ) -> None:
        self.model, self.contexts, self.budget, self.card_gb, self.rows = (
            model,
            contexts,
            budget,
            card_gb,
            rows,
        )
        self.device = model.device
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.weights = count_weights(model.config)
        torch.manual_seed(1)
        size = (1, contexts[-1] + 2 * QUESTION_TOKENS)
        self.ids = torch.randint(3, model.config.vocab_size, size, device=self.device)
        self.logits: dict[tuple[int, int], torch.Tensor] = {}  # ours by (tokens, layers): [V]
        self.layers = len(model.model.layers)
        self.rates = rates_here(str(self.device))
        self.held: OffloadedModel | None = None  # the longest document's
        self.held_budget: str | int | float = budget
        self.answer: torch.Tensor | None = None
        self.first_s = 0.0

    def document(self, ctx: int) -> torch.Tensor:
        """[1, ctx - room for a question and its answer]; a prefix of the longer ones."""
        return self.ids[:, : ctx - 2 * QUESTION_TOKENS]

    def question(self, ctx: int) -> torch.Tensor:
        return torch.cat([self.document(ctx), self.ids[:, -QUESTION_TOKENS:]], 1)

    def expected_s(self, ctx: int) -> float:
        return max(3.0, SECONDS_256K * (ctx / 262144) ** 2) + 15e-6 * ctx  # and what is pinned, unpinned

    def plan(self, config: RuntimeConfig, tokens: int) -> Plan:
        kind = self.device.type
        return make_plan(
            config, self.model.config, EMPTY, kind,
            tokens=tokens, dtype=self.model.dtype, weights=self.weights,
        )  # fmt: skip

    @contextmanager
    def with_layers(self, count: int) -> Iterator[None]:
        """The model with its first layers only."""
        config, base = self.model.config, self.model.model
        layers = base.layers
        base.layers, config.num_hidden_layers = nn.ModuleList(layers[:count]), count
        try:
            yield
        finally:
            base.layers, config.num_hidden_layers = layers, len(layers)

    def ours(
        self, ctx: int, layers: int | None = None, keep: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """TTFT, peaks beside the plan's, and where the host waited; the row of one document."""
        config = RuntimeConfig(ctx=ctx, **{"budget": self.budget, **settings})
        ids, count = self.document(ctx), layers or self.layers
        with self.with_layers(count):
            plan = self.plan(config, ids.shape[1] + 1)
            om = OffloadedModel(self.model, config)
            try:
                row, self.logits[ctx, count] = ask(om, ids, 1)
                row |= {
                    "layers": count,
                    "budget": config.budget,
                    **against_plan(om, plan.needs, self.weight_bytes),
                }
                times = predict(plan, count_weights(self.model.config), self.rates, Traffic())
                planned = {
                    "planned_ttft_s": times.ttft,
                    "planned_calibration_s": times.ttft_calibration,
                    "planned_compute_s": times.ttft_compute,
                    "planned_memory_s": times.ttft_memory,
                }
                row |= planned | {"ttft_off_by": times.ttft / row["ttft_s"] - 1}
            except BaseException:
                om.close()
                raise
        if keep:
            self.held, self.held_budget, self.first_s = om, config.budget, row["ttft_s"]
        else:
            om.close()
        return row

    def shorter(self, ctx: int) -> dict[str, Any]:
        """A second prompt, three quarters as long: the row memory of the first one is there already."""
        ids = self.document(ctx)
        with OffloadedModel(self.model, RuntimeConfig(ctx=ctx, budget=self.budget)) as om:
            first, _ = ask(om, ids, 1)
            row, _ = ask(om, ids[:, : ids.shape[1] * 3 // 4], 1)
        made = {name: row[name] - first[name] for name in ("populate_s", "register_s")}
        return row | made | {"first_ttft_s": first["ttft_s"]}

    def planned_peaks(self, ctx: int) -> dict[str, Any]:
        """Arithmetic: GPU memory above the weights in prefill, decode and a question, GiB."""
        row: dict[str, Any] = {}
        for budget in (SMALL_BUDGET, "1/16"):
            n = self.plan(RuntimeConfig(ctx=ctx, budget=budget), ctx).needs
            base = n.lasting - n.reserve - n.weights
            parts = {"prefill": n.prefill, "decode": n.slots, "question": n.slots + n.question}
            row[budget] = {name: round((base + size) / 2**30, 3) for name, size in parts.items()}
        return row

    def theirs(self, ctx: int, offloading: bool, layers: int) -> dict[str, Any]:
        """transformers' own prefill of the same tokens with its DynamicCache, and how its logits differ."""
        ids = self.document(ctx)
        free_unused(self.device)
        with self.with_layers(layers), torch.no_grad():
            cache = DynamicCache(config=self.model.config, offloading=offloading)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timer = Timer(self.device)
            arguments = {CACHE_FIELD: cache, "use_cache": True, "logits_to_keep": 1}
            logits = self.model(ids, **arguments).logits[0, -1].float().cpu()
            seconds = timer.stop()
        row: dict[str, Any] = {"tokens": ids.shape[1], "layers": layers, "measured_s": seconds}
        scale = self.layers / layers
        row["ttft_s"] = seconds * scale
        if layers < self.layers:
            row["how"] = f"{layers} of {self.layers} layers, time x {scale:g}; the peak is of {layers} layers"
        peak = row["peak_above_weights_gb"] = peak_above(self.weight_bytes, self.device)
        if peak is not None and layers < self.layers and not offloading:
            c = self.model.config
            token = (
                2
                * c.num_key_value_heads
                * (c.hidden_size // c.num_attention_heads)
                * self.model.dtype.itemsize
            )
            more = (self.layers - layers) * ids.shape[1] * token / GB  # their keys and values
            row["all_layers_would_hold_gb"] = peak + more + self.weight_bytes / GB
            row["card_gb"] = torch.cuda.get_device_properties(0).total_memory / GB
        del cache
        ours = self.logits.get((ctx, layers))
        return row | ({} if ours is None else difference(ours, logits))

    def save(self, folder: Path) -> dict[str, Any]:
        assert self.held is not None
        timer = Timer(self.device)
        self.held.save_cache(folder)
        seconds = timer.stop()
        size = sum(file.stat().st_size for file in folder.iterdir())
        return {"save_s": seconds, "snapshot_gb": size / GB, "gb_s": size / seconds / GB}

    def second_question(self, ctx: int) -> dict[str, Any]:
        """In the process that prefilled the document, without a snapshot."""
        assert self.held is not None
        row, _ = ask(self.held, self.question(ctx), ANSWER_TOKENS, resume=True)
        self.answer = row.pop("ids")
        return row | {"times_faster_than_the_first": self.first_s / row["ttft_s"]}

    def from_snapshot(self, ctx: int, folder: Path) -> dict[str, Any]:
        """In a new runtime whose caches come from disk (the weights are loaded already)."""
        with OffloadedModel(self.model, RuntimeConfig(ctx=ctx, budget=self.held_budget)) as om:
            timer = Timer(self.device)
            om.load_cache(folder)
            load_s = timer.stop()
            row, _ = ask(om, self.question(ctx), ANSWER_TOKENS, resume=True)
        same = None if self.answer is None else torch.equal(self.answer, row.pop("ids"))
        row |= {"load_s": load_s, "load_includes": "pinning", "same_tokens_as_without": same}
        return row | {"times_faster_than_the_first": self.first_s / row["ttft_s"] if self.first_s else None}

    def small_card(self, ctx: int) -> dict[str, Any]:
        """The longest document where PyTorch may hold no more than a small card's memory; kept."""
        try:
            row = self.ours(ctx, keep=True, budget=SMALL_BUDGET, gpu_memory=self.card_gb)
            if self.device.type == "cuda":
                row["largest_reserved_gb"] = torch.cuda.max_memory_reserved() / GB
            return row | {"card_gb": self.card_gb}
        finally:
            if self.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)

    def profile(self, ctx: int, layers: int) -> dict[str, Any]:
        config = RuntimeConfig(ctx=ctx, budget=self.budget)
        with self.with_layers(layers), OffloadedModel(self.model, config) as om:
            ask(om, self.document(ctx), 1)  # pins, compiles, makes plans
            figures = profiled(lambda: ask(om, self.document(ctx), 1))
        return {"layers": layers, "tokens": self.document(ctx).shape[1], **figures}


class Timer:
    def __init__(self, device: torch.device) -> None:
        import time

        self.device, self.clock = device, time.perf_counter
        self._synchronize()
        self.began = self.clock()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def stop(self) -> float:
        self._synchronize()
        return self.clock() - self.began


def ask(
    om: OffloadedModel, ids: torch.Tensor, new_tokens: int, resume: bool = False
) -> tuple[dict[str, Any], torch.Tensor]:
    """One greedy generate call: its figures, and the logits [V] after the prompt."""
    out = om.generate(
        ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, resume=resume,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    s = om.stats
    row = {"tokens": ids.shape[1], "reused": s["reused_tokens"], "ttft_s": s["ttft_s"], **s["prefill"]}
    if new_tokens > 1:
        row |= {"tpot_median_s": s["tpot_median_s"], "ids": out.sequences.cpu()}
    return row, out.logits[0][0].float().cpu()


def peak_above(weight_bytes: int, device: torch.device) -> float | None:
    return (torch.cuda.max_memory_allocated() - weight_bytes) / GB if device.type == "cuda" else None


def against_plan(om: OffloadedModel, needs: Needs, weight_bytes: int) -> dict[str, Any]:
    """Peak of GPU memory and pinned bytes beside what the plan said."""
    s, session = om.stats, om._session
    assert session is not None
    pinned = sum(cache.host.rows.nbytes for cache in session.offloaded.values())
    workspace = CUBLAS_BYTES // 3  # one stream multiplies matrices in a prefill
    planned = needs.lasting - needs.reserve + needs.prefill + workspace
    row: dict[str, Any] = {"pinned_gb": pinned / GB, "planned_pinned_gb": needs.pinned / GB}
    row |= {"pinned_off_by": pinned / needs.pinned - 1, "planned_peak_gb": planned / GB}
    peak = s["gpu_prefill_peak_gb"]
    if peak is not None:
        row |= {"peak_gb": peak, "peak_above_weights_gib": (peak * GB - weight_bytes) / 2**30}
        row["peak_off_by"] = peak * GB / planned - 1
    return row


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, Any]:
    """Of two [V] logits; the spread is what a difference is to be seen against."""
    return {
        "same_argmax": bool(ours.argmax() == theirs.argmax()),
        "largest_logit_difference": float((ours - theirs).abs().max()),
        "mean_logit_difference": float((ours - theirs).abs().mean()),
        "spread_of_logits": float(theirs.std()),
    }
