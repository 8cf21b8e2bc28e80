"""A quality target instead of a budget: the cheapest measured setting that holds enough attention mass."""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..config import parse_budget
from ..errors import RunError, UserError
from .eval_model import EvalModel
from .grid import Setting
from .summary import setting_of


def choose(lines: Sequence[dict[str, Any]], target: float) -> tuple[Setting, float]:
    """The cheapest setting whose attended mass reaches target at every context, and that mass.

    lines: what the suite attention reports of one model. Cheapest is the smallest
    budget, then the fewest bits of labels a key. RunError when none reaches it.
    """
    masses: dict[Setting, float] = {}
    for line in lines:
        setting = setting_of(line)
        masses[setting] = min(line["attended"], masses.get(setting, 1.0))
    longest = max(line["ctx"] for line in lines)
    good = [setting for setting, mass in masses.items() if mass >= target]
    if not good:
        best = max(masses, key=lambda setting: masses[setting])
        raise RunError(
            f"no setting attends to {target} of the mass; the best, {best.label}, to {masses[best]:.4f}; "
            "give larger values of --budget, --channels or --label-bits"
        )
    chosen = min(good, key=lambda s: (budget_tokens(s, longest), (s.channels or 0) * s.bits, s.bits))
    return chosen, masses[chosen]


def budget_tokens(setting: Setting, ctx: int) -> Fraction:
    budget = parse_budget(setting.budget)
    return budget * ctx if isinstance(budget, Fraction) else Fraction(budget)


def write_choice(
    model: EvalModel, lines: Sequence[dict[str, Any]], target: float, out: Path
) -> tuple[Setting, float, Path]:
    """Choose, and write the label maps with the choice in their provenance to OUT.

    `--calibration` with that file then uses its budget, label bits and new rows unless others are given.
    """
    chosen, mass = choose(lines, target)
    calibration = model.calibration(chosen.channels)
    model.close()
    if calibration is None:
        raise UserError(
            f"{model.name} has no calibration file to write the choice into; "
            "run `ds-offload calibrate`, or give a text with --calibrate-on"
        )
    choice = {
        "budget": chosen.budget,
        "label_bits": str(chosen.bits),
        "new_rows": chosen.new_rows,
        "quality_target": f"{target} of the attention mass",
        "quality_measured": f"{mass:.4f}",
        "quality_contexts": ",".join(sorted({str(line["ctx"]) for line in lines}, key=int)),
    }
    file = out / f"calibration-{model.name}-quality.safetensors"
    replace(calibration, provenance={**calibration.provenance, **choice}).save(file)
    return chosen, mass, file
