"""RuntimeConfig: every setting of the runtime, checked once."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .errors import UserError

PREFETCH_MODES = ("correct", "predict", "off")
PLACEMENTS = ("host", "gpu", "auto")
LABEL_BITS = (16, 8, 4)
LABEL_WIDTHS = (16, 32, 64, 128)  # label channels the kernels are built for; R is padded to one of them
DEFAULT_LABEL_CHANNELS = 32  # projected to 32 at 4 bits: the best found at 20 bytes a key (NOTES.md, labels)
# Tokens a calibration reads. Measured: 8,192 find the mass that 16,384 find; four times that, because a text
# of many kinds costs seconds and nobody has to know (the CLI's and the function's one default).
CALIBRATION_TOKENS = 32768
# Sticky selection by default. 2,048 rows of 8 KV heads are 8.4 MB a layer, which come over the link in about
# the time that a layer of the 8B shape computes (0.2 ms; NOTES.md): fewer gain nothing. What an eighth of the
# budget keeps of exact selection's mass is in bench/results/sticky_*.json.
STICKY_ROWS, STICKY_PART = 2048, 8
CAPACITY_STEP = 1024  # tokens; caches grow in steps of an eighth of their size, at least this


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings of an OffloadedModel.

    ctx: most tokens of a sequence, prompt plus new ones.
    budget: tokens selected per KV head besides sinks and recent ones, as a
        fraction of the sequence ("1/16", 0.0625) or as a count (2048).
    budget_mass: select for every KV head only as many tokens as hold this share of its
        attention mass by the calibration's measurements, `budget` at most; None: `budget`.
    prefetch: "correct" (prediction only moves rows early), "predict" (attention
        uses the predicted selection, the paper's DS-Offload) or "off".
    label_channels, label_bits: R numbers of every key, at 16, 8 or 4 bits; R defaults
        to the calibration's, or to 32 when the model calibrates itself.
    sinks, recent: first and last tokens that are always attended to.
    slots: resident rows per layer and KV head; default twice the budget.
    new_rows: sticky selection: at most this many new rows a step and KV head, as a count or as a
        part of ctx's budget ("1/8"). "auto": the larger of 2,048 and an eighth of ctx's budget; exact for
        budgets above half of ctx and in mode "predict", whose queries are guesses (what a text looks up may
        rank below the best new rows). "none" or None: exact. Budgets up to this many rows are exact, too.
    chunk_tokens: tokens a prefill chunk; default by device.
    calibration: path of a calibration file; default the model's own, else self-calibration.
    cuda_graph: replay decode steps as one CUDA graph.
    placement: where the rows are: "host" (pinned memory), "gpu", or "auto", which keeps
        them on the GPU when the plan fits there. On a CPU it means nothing.
    fit: when the plan does not fit, shrink slots, then label bits, then the budget.
    gpu_memory: GB (1e9 bytes) of GPU memory to use at most, as if the card had no more; default all.
    audit_every: N compares every N-th decode step with exact attention (audit.py); None is off.
    """

    ctx: int = 262144
    budget: str | int | float = "1/16"
    prefetch: str = "correct"
    label_channels: int | None = None
    label_bits: int = 4
    sinks: int = 16
    recent: int = 64
    slots: int | None = None
    new_rows: str | int | None = "auto"
    chunk_tokens: int | None = None
    calibration: str | None = None
    seed: int | None = None
    cuda_graph: bool = True
    placement: str = "host"
    fit: bool = False
    gpu_memory: float | None = None
    audit_every: int | None = None
    budget_mass: float | None = None

    def __post_init__(self) -> None:
        if self.prefetch not in PREFETCH_MODES:
            raise UserError(f"prefetch is {self.prefetch!r}; choose one of {', '.join(PREFETCH_MODES)}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"placement is {self.placement!r}; choose one of {', '.join(PLACEMENTS)}")
        if self.label_bits not in LABEL_BITS:
            raise UserError(f"label_bits is {self.label_bits}; choose 16, 8 or 4")
        if self.recent < 1 or self.sinks < 0:
            raise UserError("recent must be at least 1 (the current token) and sinks at least 0")
        if self.label_channels is not None and not 1 <= self.label_channels <= LABEL_WIDTHS[-1]:
            raise UserError(f"label_channels is {self.label_channels}; choose 1 to {LABEL_WIDTHS[-1]}")
        if self.budget_mass is not None and not 0 < self.budget_mass < 1:
            raise UserError(
                f"budget_mass is {self.budget_mass}; give a share above 0 and below 1, such as 0.98"
            )
        for name in ("ctx", "slots", "chunk_tokens", "audit_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.gpu_memory is not None and self.gpu_memory <= 0:
            raise UserError(f"gpu_memory is {self.gpu_memory}; it must be above 0")
        self.budget_tokens(self.ctx)
        self.entering(self.ctx)

    def budget_tokens(self, tokens: int) -> int:
        """K for a sequence of that many tokens, at least 1 and at most all of them."""
        budget = parse_budget(self.budget)
        if isinstance(budget, Fraction):
            return max(1, min(tokens, -(-tokens * budget.numerator // budget.denominator)))
        if budget > self.ctx:
            raise UserError(f"budget {budget} is larger than ctx {self.ctx}; lower it or use a fraction")
        return min(budget, tokens)

    def entering(self, budget_tokens: int) -> int | None:
        """Sticky selection's new rows a step in caches that select at most budget_tokens; None: exact.

        The number depends on ctx alone, so that a sequence selects alike in caches of any size and beside
        any others.
        """
        most = self.budget_tokens(self.ctx)
        limit: int | Fraction | None
        if self.new_rows == "auto":
            sticky = 2 * most <= self.ctx and self.prefetch != "predict"
            limit = max(STICKY_ROWS, most // STICKY_PART) if sticky else None
        else:
            limit = parse_new_rows(self.new_rows)
        if isinstance(limit, Fraction):
            limit = max(1, int(limit * most))
        return limit if limit is not None and limit < budget_tokens else None

    def capacity(self, tokens: int) -> int:
        """Tokens to make room for: the need, rounded up so that similar prompts share caches."""
        step = max(CAPACITY_STEP, (1 << tokens.bit_length()) // 16)
        return min(-(-tokens // step) * step, max(self.ctx, tokens))

    def slot_count(self, budget_tokens: int, capacity: int) -> int:
        """Resident slots per layer and KV head, never fewer than the budget."""
        wanted = 2 * budget_tokens if self.slots is None else self.slots
        return max(budget_tokens, min(wanted, capacity))


def parse_budget(value: str | int | float) -> int | Fraction:
    """A count of tokens, or a fraction in (0, 1]; UserError when it is neither."""
    hint = "give a number of tokens (2048) or a fraction of the context (1/16)"
    text = str(value).strip()
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"budget {text!r} is not a number; {hint}") from None
    if number <= 0:
        raise UserError(f"budget {text} is not above 0; {hint}")
    written_as_fraction = "/" in text or "." in text or isinstance(value, float)
    if not written_as_fraction:
        return int(number)
    if number > 1:
        raise UserError(f"budget {text} is above 1 as a fraction; {hint}")
    return number


def parse_new_rows(value: str | int | None) -> int | Fraction | None:
    """A count of rows, a part of the budget below 1, or None for exact selection; UserError otherwise."""
    text = str(value).strip()
    if text.lower() == "none":
        return None
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    part = "/" in text or "." in text
    if number <= 0 or (part and number > 1):
        kinds = "rows (2048), a part of the budget (1/8), none for exact selection, or auto"
        raise UserError(f"new_rows is {text!r}; give {kinds}")
    return number if part else int(number)


def label_width(channels: int) -> int:
    """Channels after padding to a width the kernels are built for."""
    return next(width for width in LABEL_WIDTHS if width >= channels)


def make_config(settings: dict[str, Any]) -> RuntimeConfig:
    """A RuntimeConfig from keyword arguments; an unknown name is an error that lists the known ones."""
    known = RuntimeConfig.__dataclass_fields__
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(known)}")
    return RuntimeConfig(**settings)
