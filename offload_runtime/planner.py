"""The plan: bytes of everything a run will allocate, from the model's config alone.

A plan is made before the weights load, and one that does not fit is refused
with the numbers and the largest settings that would.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from transformers import PretrainedConfig

from .cache.layout import KVLayout
from .config import DEFAULT_LABEL_CHANNELS, RuntimeConfig, parse_budget
from .errors import RunError
from .input_guess import guess_bytes
from .layouts import make_layout
from .memory import FreeMemory
from .model_check import ModelShape, check_config
from .prefill import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, KEEP_SLOTS_TOKENS
from .prefill_memory import prefill_bytes
from .weights import Weights, count_weights

GB = 1e9
# Kept free on a GPU: cuBLAS workspaces, compiled kernels, the CUDA graph's pool and what the
# allocator loses to fragments. An assumption, not a measurement.
GPU_RESERVE_BYTES = 768 << 20
# Where halving the chunk stops: 50 MB of activations in the 8B shape, so less frees nothing (arithmetic).
LEAST_CHUNK_TOKENS = 512
SMALLEST_CTX, LARGEST_CTX = 64, 1 << 24  # where the search for the largest context starts and stops
LARGEST_BATCH = 1 << 12


@dataclass(frozen=True)
class Needs:
    """Bytes a run allocates. Everything but pinned rows is device memory.

    rows: KV rows that stay on the device (placement "gpu"); pinned: those in host memory.
    prefill: a whole prompt's work, while there are no slots; question: that of a prompt beside
    the slots: a short one, be it a follow-up or all there is, or any one in continuous batching.
    """

    weights: int
    labels: int
    slots: int
    rings: int
    maps: int
    workspace: int
    prefill: int
    question: int
    reserve: int
    pinned: int
    rows: int = 0

    @property
    def lasting(self) -> int:
        """What is there from the first prefill to the last step: decode scratch stays while prefill runs."""
        caches = self.labels + self.rings + self.maps + self.rows
        return self.weights + caches + self.workspace + self.reserve

    @property
    def device(self) -> int:
        """Peak of device memory."""
        return self.lasting + max(self.prefill, self.slots + self.question)


@dataclass(frozen=True)
class Plan:
    """What a run needs, what is free, and the largest settings that fit (0 when none does)."""

    tokens: int
    batch: int
    budget: int
    device: str  # "cuda" or "cpu"
    layout: KVLayout
    needs: Needs
    free: FreeMemory
    largest_ctx: int
    largest_budget: int
    shape: ModelShape
    largest_batch: int = 0
    chunk_tokens: int = 0  # of a prefill: the largest that fits

    @property
    def placement(self) -> str:
        """Where the KV rows go: "host" or "gpu"."""
        return "gpu" if self.needs.rows else "host"

    @property
    def gpu_bytes(self) -> int:
        return self.needs.device if self.device == "cuda" else 0

    @property
    def host_bytes(self) -> int:
        return host_need(self.needs, self.device)

    @property
    def fits(self) -> bool:
        return within(self.needs, self.device, self.free)

    def lines(self) -> list[tuple[str, str]]:
        """(name, value) pairs for a table."""
        n = self.needs
        parts = [
            ("weights", n.weights),
            ("KV rows", n.rows),
            (f"labels, {self.layout.label_channels} x {self.layout.label_bits} bit", n.labels),
            (f"slots, {self.layout.slots} rows a KV head", n.slots),
            ("rings of sliding layers", n.rings),
            ("slot maps", n.maps),
            ("decode workspace", n.workspace),
            (f"prefill by {self.chunk_tokens} tokens, no slots yet", n.prefill),
            ("prefill beside the slots", n.question),
            ("reserve", n.reserve),
        ]
        kind = "GPU" if self.device == "cuda" else "host"
        rows = [(f"{kind}: {name}", gb(size)) for name, size in parts if size]
        if self.device == "cuda":
            free = gb(self.free.gpu) if self.free.gpu is not None else "not known, no GPU here"
            rows.append(("GPU: most at a time / free", f"{gb(self.gpu_bytes)} / {free}"))
        rows.append(("host: KV rows" + (", pinned" if self.device == "cuda" else ""), gb(n.pinned)))
        rows.append(("host: total / free", f"{gb(self.host_bytes)} / {gb(self.free.host)}"))
        rows.append(("fits", "yes" if self.fits else "no"))
        rows.append(("largest ctx at this budget", str(self.largest_ctx or "none")))
        rows.append(("largest budget at this ctx", f"{self.largest_budget or 'none'}"))
        rows.append(("largest batch at both", f"{self.largest_batch or 'none'}"))
        return rows


def gb(size: float) -> str:
    return f"{size / GB:.2f} GB"


def host_need(needs: Needs, device: str) -> int:
    """Host bytes. On a GPU machine weights pass through host memory before any row is pinned."""
    if device == "cpu":
        return needs.device + needs.pinned
    return max(needs.weights, needs.pinned)


def within(needs: Needs, device: str, free: FreeMemory) -> bool:
    gpu_fits = device == "cpu" or free.gpu is None or needs.device <= free.gpu
    return gpu_fits and host_need(needs, device) <= free.host


def make_plan(
    config: RuntimeConfig,
    model_config: PretrainedConfig,
    free: FreeMemory,
    device: str,
    *,
    tokens: int | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    continuous: bool = False,
    place_tokens: tuple[int, ...] = (),
) -> Plan:
    """Plan `batch` sequences of `tokens` (default ctx) each on device "cuda" or "cpu".

    place_tokens: host memory for so many tokens of each sequence only. continuous: they come and go one
    by one, so everybody's slots stay while one prefills.
    dtype: default the checkpoint's on CUDA and float32 on CPU, as in loading.
    Raises UserError for a model or setting that cannot be decoded.
    """
    shape = check_config(model_config)
    shape = replace(shape, dtype=dtype or (shape.dtype if device == "cuda" else torch.float32))
    weights = weights or count_weights(model_config)
    weight_bytes, unpacked = weights.bytes_in(shape.dtype), weights.unpacked_bytes_in(shape.dtype)
    tokens = config.ctx if tokens is None else tokens

    def needs_in(trial: RuntimeConfig, count: int, chunk: int, batch: int) -> Needs:
        layout = layout_of(shape, trial, count, batch, place_tokens if batch == len(place_tokens) else ())
        on_host = needs_for(shape, layout, trial, count, chunk, weight_bytes, device, continuous, unpacked)
        on_gpu = replace(on_host, rows=on_host.pinned, pinned=0)
        if device == "cpu" or trial.placement == "host":
            return on_host
        if trial.placement == "gpu" or (free.gpu is not None and within(on_gpu, device, free)):
            return on_gpu
        return on_host

    def best(trial: RuntimeConfig, count: int, batch: int = batch) -> tuple[int, Needs]:
        """The largest chunk that fits, the smallest when none does, and what the run needs with it."""
        for chunk in chunk_sizes(trial, device):
            needs = needs_in(trial, count, chunk, batch)
            if within(needs, device, free):
                break
        return chunk, needs

    def fits(trial: RuntimeConfig, count: int, batch: int = batch) -> bool:
        return within(best(trial, count, batch)[1], device, free)

    chunk, needs = best(config, tokens)
    budget = parse_budget(config.budget)
    lowest_ctx = SMALLEST_CTX if isinstance(budget, Fraction) else max(budget, SMALLEST_CTX)
    return Plan(
        tokens=tokens,
        batch=batch,
        budget=config.budget_tokens(tokens),
        device=device,
        layout=layout_of(shape, config, tokens, batch, place_tokens),
        largest_batch=largest(lambda b: fits(config, tokens, b), 1, LARGEST_BATCH),
        shape=shape,
        needs=needs,
        chunk_tokens=chunk,
        free=free,
        largest_ctx=largest(lambda n: fits(replace(config, ctx=n), n), lowest_ctx, LARGEST_CTX),
        largest_budget=largest(lambda k: fits(replace(config, budget=k), tokens), 1, tokens),
    )


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in [low, high] that fits, 0 if none; needs grow with the number."""
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def chunk_sizes(config: RuntimeConfig, device: str) -> list[int]:
    """Tokens a prefill chunk may have, best first: the user's choice, or the default and its halves."""
    default = GPU_CHUNK_TOKENS if device == "cuda" else CPU_CHUNK_TOKENS
    if config.chunk_tokens is not None:
        return [config.chunk_tokens]
    halves = [default >> n for n in range(default.bit_length())]
    return [size for size in halves if size >= LEAST_CHUNK_TOKENS]


def layout_of(
    shape: ModelShape,
    config: RuntimeConfig,
    tokens: int,
    batch: int,
    place_tokens: tuple[int, ...] = (),
) -> KVLayout:
    """The caches' layout, as the engine makes it for a model without a calibration file."""
    channels = min(config.label_channels or DEFAULT_LABEL_CHANNELS, shape.head_dim)
    return make_layout(shape, config, channels, batch, config.capacity(tokens), place_tokens)


def needs_for(
    shape: ModelShape,
    layout: KVLayout,
    config: RuntimeConfig,
    tokens: int,
    chunk: int,
    weight_bytes: int,
    device: str,
    continuous: bool,
    unpacked: int = 0,
) -> Needs:
    on_gpu = device == "cuda"
    short = tokens if continuous else min(tokens, KEEP_SLOTS_TOKENS)
    return Needs(
        weights=weight_bytes,
        labels=layout.layers * layout.label_bytes,
        slots=layout.layers * layout.slot_bytes,
        rings=layout.window_bytes,
        maps=layout.layers * layout.map_bytes,
        workspace=workspace_bytes(shape, layout, config),
        prefill=prefill_bytes(shape, layout, chunk, tokens, on_gpu, unpacked),
        question=prefill_bytes(shape, layout, chunk, short, on_gpu, unpacked),
        reserve=GPU_RESERVE_BYTES if on_gpu else 0,
        pinned=layout.layers * layout.host_bytes,
    )


def workspace_bytes(shape: ModelShape, layout: KVLayout, config: RuntimeConfig) -> int:
    """Decode scratch: what the layers share, one step's logits, a layer's last selections if sticky, and
    what a calibration may know of predictions."""
    logits = 3 * layout.batch * shape.vocab * 4  # float32: logits, processed scores, probabilities
    sticky = 0 if config.entering(layout.budget) is None else layout.sticky_bytes
    predicts = config.prefetch != "off"
    widths = (shape.hidden, shape.query_heads * shape.head_dim)
    guesses = guess_bytes(shape.layers, *widths, shape.dtype.itemsize) if predicts else 0
    return layout.workspace_bytes + sticky + logits + guesses


def require(plan: Plan) -> None:
    """RunError in one line, with the numbers and what would fit, when the plan does not fit."""
    if plan.fits:
        return
    n, free = plan.needs, plan.free
    gpu_short = plan.device == "cuda" and free.gpu is not None and n.device > free.gpu
    if gpu_short:
        caches = n.labels + n.rings + n.maps + n.rows
        work = max(n.prefill, n.slots + n.question)
        parts = f"weights {gb(n.weights)}, caches {gb(caches)}, prefill or slots {gb(work)}"
        short = f"{gb(n.device)} of GPU memory ({parts}) and {gb(free.gpu or 0)} are free"
    else:
        short = f"{gb(plan.host_bytes)} of host memory (KV rows {gb(n.pinned)}) and {gb(free.host)} are free"
    raise RunError(f"{plan.batch} x {plan.tokens} tokens need {short}; {what_fits(plan)}")


def what_fits(plan: Plan) -> str:
    options = []
    if plan.largest_ctx:
        options.append(f"--ctx {plan.largest_ctx} at this budget")
    if plan.largest_budget:
        options.append(f"--budget {plan.largest_budget} at this ctx")
    if not options:
        return "no context fits: take a smaller model or a machine with more memory"
    return "the most that fits is " + " or ".join(options)
