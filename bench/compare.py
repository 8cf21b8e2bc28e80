"""Runs what `ds-offload bench` was asked for: every row measured alone, memory freed between rows.

A row that fails, for want of memory or otherwise, is recorded with the reason and the next one goes on.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from offload_runtime.adapter import ModelAdapter
from offload_runtime.bench.baselines import dense_times, hf_pinned_bytes, hf_times, streaming_times
from offload_runtime.bench.cost_card import GB, Ceilings, cost_card
from offload_runtime.bench.driven import DrivenSession
from offload_runtime.bench.host_store import HostStore
from offload_runtime.bench.locality import Locality
from offload_runtime.bench.report import Report
from offload_runtime.bench.request import Request, Setting
from offload_runtime.bench.shapes import random_model, shape_config, shape_dtype
from offload_runtime.errors import RunError, UserError
from offload_runtime.memory import measure
from offload_runtime.weights import count_weights

# Settling: the eager and the captured step, and the resident set's way to its steady state.
SETTLE_STEPS, SETTLE_STEPS_STICKY = 8, 16
# Slow baselines stop earlier: at 8B, 262,144 tokens, a streaming step takes 0.7 s, an offloaded one 4 to 6 s.
MOST_STEPS = {"dense": 50, "streaming": 5, "hf-dense": 20, "hf-offloaded": 2}
NAMED = ("shape", "ctx", "batch", "what", "budget", "prefetch", "new_rows", "resident", "locality")
HOST_SPARE_BYTES = 4 << 30  # left to the system when pinned memory is planned

Say = Callable[[str], None]


class Comparison:
    """All rows of one request. say: one line of progress."""

    def __init__(
        self, request: Request, report: Report, ceilings: Ceilings, localities: list[Locality], say: Say
    ) -> None:
        self.request, self.report, self.ceilings, self.say = request, report, ceilings, say
        self.localities = localities
        self.device = torch.device(request.device)

    def run(self, on_card: Callable[[dict[str, Any]], None]) -> None:
        """Shape by shape; on_card is called with every cost card."""
        for shape in self.request.shapes:
            self._run_shape(shape, on_card)
            self._free()

    def _run_shape(self, shape: str, on_card: Callable[[dict[str, Any]], None]) -> None:
        """One model, one store of host rows; transformers' offloaded cache when that memory is free again."""
        groups = [(ctx, batch) for ctx in self.request.ctxs for batch in self.request.batches]
        refusal = self._weights_refusal(shape, max(self.request.ctxs))
        if refusal:
            for ctx, batch in groups:
                self._failed(empty_row(shape, ctx, batch, "every row"), refusal)
            return
        adapter = ModelAdapter(random_model(shape, max(self.request.ctxs), self.request.device))
        for ctx, batch in groups:
            card = cost_card(adapter, shape, ctx, batch, self.request.budgets, self.ceilings)
            self.report.data["cost_cards"].append(card)
            on_card(card)
        with torch.no_grad():
            for ctx, batch in groups:
                for name in ("dense", "hf-dense", "streaming"):
                    self._baseline(adapter, shape, ctx, batch, name)
            self._offloaded_groups(adapter, shape, groups)
            self._free()
            for ctx, batch in groups:
                self._baseline(adapter, shape, ctx, batch, "hf-offloaded")

    def _weights_refusal(self, shape: str, positions: int) -> str | None:
        """Why a model of this shape cannot be made here, None when it can."""
        free = measure(self.request.device)
        here = free.host if self.device.type == "cpu" or free.gpu is None else free.gpu
        size = count_weights(shape_config(shape, positions)).bytes_in(shape_dtype(self.device))
        if size <= here:
            return None
        return f"does not fit: weights of {size / GB:.1f} GB, {here / GB:.1f} GB free"

    def _offloaded_groups(self, adapter: ModelAdapter, shape: str, groups: list[tuple[int, int]]) -> None:
        """Everything that reads host rows: one store, as large as the largest group that fits."""
        row = 2 * adapter.head_dim * adapter.kv_heads
        room = measure("cpu").host - HOST_SPARE_BYTES
        a_token = row * adapter.dtype.itemsize * len(adapter.layers)
        fitting = [group for group in groups if group[0] * group[1] * a_token <= room]
        for ctx, batch in groups:
            if (ctx, batch) not in fitting:
                need = ctx * batch * a_token / GB
                why = f"does not fit: {need:.1f} GB of host rows, {room / GB:.1f} GB free"
                self._failed(empty_row(shape, ctx, batch, "ds-offload"), why)
        if not fitting:
            return
        tokens = max(ctx * batch for ctx, batch in fitting)
        started = time.perf_counter()
        try:
            store = HostStore(len(adapter.layers), tokens * row, adapter.dtype, adapter.device)
        except MemoryError as error:
            for ctx, batch in fitting:
                self._failed(empty_row(shape, ctx, batch, "ds-offload"), reason(error))
            return
        self.say(f"{store.nbytes / GB:.1f} GB of host rows made in {time.perf_counter() - started:.1f} s")
        for ctx, batch in fitting:
            for setting in self.request.settings(ctx):
                self._session(adapter, shape, ctx, batch, setting, store)

    def _baseline(self, adapter: ModelAdapter, shape: str, ctx: int, batch: int, name: str) -> None:
        if name not in self.request.baselines:
            return
        steps = min(self.request.steps, MOST_STEPS[name])
        kv_bytes = 2 * adapter.head_dim * adapter.kv_heads * len(adapter.layers) * ctx * batch
        kv_bytes *= adapter.dtype.itemsize
        row = empty_row(shape, ctx, batch, name) | {"graph": name == "dense" and self.device.type == "cuda"}

        def times() -> list[float]:
            if name == "dense":
                return dense_times(adapter, ctx, batch, steps)
            if name == "streaming":
                row.update(moved_gb=kv_bytes / GB, pinned_gb=kv_bytes / GB)
                return streaming_times(adapter, ctx, batch, steps)
            if name == "hf-offloaded":
                self._check_offloaded(hf_pinned_bytes(adapter, ctx, batch))
                # Every layer goes to the GPU whole, and whole back.
                row.update(moved_gb=2 * kv_bytes / GB, pinned_gb=hf_pinned_bytes(adapter, ctx, batch) / GB)
            return hf_times(adapter, ctx, batch, steps, name == "hf-offloaded")

        self._measured(row, times)

    def _check_offloaded(self, size: int) -> None:
        """UserError when transformers' offloaded cache cannot run here."""
        if self.device.type != "cuda":
            raise UserError("needs a CUDA GPU")
        room = measure("cpu").host - HOST_SPARE_BYTES
        if size > room:
            raise UserError(f"does not fit: pins {size / GB:.1f} GB, {room / GB:.1f} GB free")

    def _session(
        self, adapter: ModelAdapter, shape: str, ctx: int, batch: int, setting: Setting, store: HostStore
    ) -> None:
        """All rows of one session: localities, then with nothing kept resident."""
        config = setting.config(ctx)
        base = empty_row(shape, ctx, batch, "ds-offload") | {
            "budget": setting.budget, "budget_tokens": config.budget_tokens(ctx),
            "prefetch": setting.prefetch, "new_rows": setting.new_rows,
        }  # fmt: skip
        kinds = [("on", locality) for locality in self.request.localities if "on" in self.request.resident]
        if "off" in self.request.resident and setting.new_rows is None:
            # Nothing is reused, so that only how well predictions do is left of locality.
            kinds.append(("off", self.request.localities[-1]))
        sessions: list[DrivenSession] = []

        def open_session() -> DrivenSession:
            if not sessions:
                sessions.append(DrivenSession(adapter, config, batch, store))
            return sessions[0]

        for resident, locality in kinds:
            row = base | {"resident": resident, "locality": f"{locality}-locality"}
            failed = self._measured(row, lambda row=row: self._driven_times(open_session(), row))  # type: ignore[misc]
            if failed:
                break  # what does not fit once does not fit again
        for session in sessions:
            session.close()
        sessions.clear()
        self._free()

    def _driven_times(self, session: DrivenSession, row: dict[str, Any]) -> list[float]:
        """Milliseconds of steps; puts what they moved into the row."""
        settle = SETTLE_STEPS if row["new_rows"] is None else SETTLE_STEPS_STICKY
        settle, steps = min(settle, self.request.steps + 2), self.request.steps
        session.restart(settle + steps)
        measured = row["locality"] == "measured-locality"
        share = row["budget_tokens"] / row["ctx"]
        target = min(self.localities, key=lambda found: abs(found.share - share)) if measured else None
        session.drive(*((None,) if target is None else (target.overlap, target.recall)))
        session.restart(settle + steps)
        for _ in range(settle):
            session.advance()
        before = session.counted()
        times = [session.timed_step(row["resident"] == "on") for _ in range(steps)]
        delta = {name: count - before[name] for name, count in session.counted().items()}
        layout = session.layout
        row.update(
            moved_gb=delta["fetched"] * layout.row_bytes / steps / GB,
            moved_of_selected=round(delta["fetched"] / max(delta["selected"], 1), 4),
            prediction_recall=round(delta["found"] / delta["checked"], 4) if delta["checked"] else None,
            target_overlap=None if target is None else target.overlap,
            target_recall=None if target is None else target.recall,
            pinned_gb=layout.layers * layout.host_bytes / GB if self.device.type == "cuda" else 0.0,
            graph=session.decoder.graph is not None,
        )
        return times

    def _measured(self, row: dict[str, Any], times: Callable[[], list[float]]) -> bool:
        """Fill in a row and keep it, failed or not; whether it failed."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            row.update(summary(times(), row["batch"]))
        except (UserError, RunError, MemoryError, RuntimeError) as error:
            # The traceback holds what the row allocated.
            error.__traceback__ = None
            self._failed(row, reason(error))
            self._free()
            return True
        if self.device.type == "cuda":
            row["gpu_gb"] = torch.cuda.max_memory_allocated() / GB
        if row["moved_gb"] is not None:
            row["link_gb_s"] = row["moved_gb"] * 1e3 / row["tpot_ms"]
            if self.ceilings.link_gb_s:
                row["link_percent"] = 100 * row["link_gb_s"] / self.ceilings.link_gb_s
        self._keep(row)
        self._free()
        return False

    def _failed(self, row: dict[str, Any], why: str) -> None:
        figures = ("moved_gb", "pinned_gb", "moved_of_selected", "prediction_recall")
        self._keep(row | {"error": why} | dict.fromkeys(figures))

    def _keep(self, row: dict[str, Any]) -> None:
        self.report.add({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
        kept = self.report.rows[-1]
        words = [
            str(kept[name])
            for name in (
                "shape",
                "ctx",
                "batch",
                "what",
                "budget",
                "prefetch",
                "new_rows",
                "resident",
                "locality",
            )
            if kept[name] is not None
        ]
        self.say(f"{' '.join(words)}: {kept['error'] or str(kept['tpot_ms']) + ' ms'}")

    def _free(self) -> None:
        """Give memory that nothing refers to back to the system."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            clear_workspaces: Any = torch._C
            clear_workspaces._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            clear_workspaces._host_emptyCache()  # what transformers' offloaded cache pinned


def empty_row(shape: str, ctx: int, batch: int, what: str) -> dict[str, Any]:
    """Every field of a row; None where it does not apply."""
    figures = (
        "budget", "budget_tokens", "prefetch", "new_rows", "resident", "locality", "steps",
        "tpot_ms", "p20_ms", "p80_ms", "tokens_per_s", "vs_dense", "vs_streaming",
        "vs_hf_offloaded", "moved_gb", "link_gb_s", "link_percent", "moved_of_selected", "prediction_recall",
        "target_overlap", "target_recall", "gpu_gb", "pinned_gb", "graph", "error",
    )  # fmt: skip
    return {"what": what, "shape": shape, "ctx": ctx, "batch": batch} | dict.fromkeys(figures)


def summary(times: list[float], batch: int) -> dict[str, Any]:
    """Median and spread of steps."""
    ordered, steps = sorted(times), len(times)
    median = statistics.median(times)
    return {
        "steps": steps, "tpot_ms": round(median, 4), "p20_ms": round(ordered[steps // 5], 4),
        "p80_ms": round(ordered[steps * 4 // 5], 4), "tokens_per_s": round(batch * 1000 / median, 3),
    }  # fmt: skip


def reason(error: BaseException) -> str:
    """One short line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {lines[0][:120]}"
    kind = "out of host memory: " if isinstance(error, MemoryError) else ""
    if isinstance(error, RuntimeError) and not isinstance(error, RunError):
        kind = "failed: "
    return kind + lines[0][:160]
