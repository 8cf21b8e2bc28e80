"""The grid: every combination of the settings that were given as lists."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..config import RuntimeConfig, parse_budget
from ..errors import UserError


@dataclass(frozen=True)
class Setting:
    """One point of the grid. channels None: the calibration's own R, or the default.

    new_rows: as in RuntimeConfig, "none" for exact selection.
    """

    budget: str
    channels: int | None = None
    bits: int = 4
    prefetch: str = "correct"
    new_rows: str = "auto"

    @property
    def is_dense(self) -> bool:
        return parse_budget(self.budget) == 1 and "/" in self.budget

    @property
    def label(self) -> str:
        """For tables and legends, such as "1/16, R 32, 4 bit, correct, 1/8 new"."""
        if self.is_dense:
            return "dense"
        width = "default R" if self.channels is None else f"R {self.channels}"
        sticky = {"auto": "", "none": ", exact"}.get(self.new_rows, f", {self.new_rows} new")
        return f"{self.budget}, {width}, {self.bits} bit, {self.prefetch}{sticky}"

    def facts(self) -> dict[str, Any]:
        return asdict(self)

    def config(self, ctx: int, seed: int, **others: Any) -> RuntimeConfig:
        return RuntimeConfig(
            ctx=ctx,
            budget=self.budget,
            prefetch=self.prefetch,
            label_channels=self.channels,
            label_bits=self.bits,
            new_rows=self.new_rows,
            seed=seed,
            **others,
        )


# The reference: everything is selected, so labels and prediction don't matter.
DENSE = Setting("1/1", None, 4, "off")


def make_grid(
    budgets: str, channels: str | None, bits: str, prefetch: str, new_rows: str = "auto"
) -> list[Setting]:
    """All combinations of comma-separated lists, dense first; UserError names the value that is wrong."""
    widths = [None] if channels is None else integers(channels, "--channels")
    axes = (
        words(budgets, "--budget"),
        widths,
        integers(bits, "--label-bits"),
        words(prefetch, "--prefetch"),
        words(new_rows, "--new-rows"),
    )
    settings = [Setting(*point) for point in itertools.product(*axes)]
    for setting in settings:
        setting.config(ctx=1 << 30, seed=0)  # its checks, before anything is loaded
    return [DENSE, *dict.fromkeys(setting for setting in settings if not setting.is_dense)]


def words(text: str, option: str) -> list[str]:
    """The parts of a comma-separated list."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UserError(f"{option} is {text!r}; give values separated by commas")
    return list(dict.fromkeys(parts))


def integers(text: str, option: str) -> list[int]:
    return numbers(text, option, int)


def fractions(text: str, option: str) -> list[float]:
    """Numbers from 0 to 1."""
    values = numbers(text, option, float)
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"{option} is {text!r}; its numbers must be between 0 and 1")
    return values


def numbers(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(word) for word in words(text, option)]
    except ValueError:
        raise UserError(f"{option} is {text!r}; give numbers separated by commas") from None
