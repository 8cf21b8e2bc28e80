"""What a calibration decides for single layers and heads: budgets, and which layers are predicted."""

from collections.abc import Iterable

from .calibration import Calibration
from .config import RuntimeConfig

LEAST_ADAPTIVE = 64  # tokens: more than the sentence that a pass key or a line stands in


def head_budgets(config: RuntimeConfig, calibration: Calibration, tokens: int) -> int | list[list[int]]:
    """K for so many tokens: config.budget, or of each layer's KV heads, less where less holds budget_mass.

    LEAST_ADAPTIVE at least: a mean over text does not show what a head looks up once in
    a document. Without a measured curve (a prompt of fewer than 256 tokens calibrates
    itself) config.budget is K.
    """
    cap, curve = config.budget_tokens(tokens), calibration.mass_curve
    if config.budget_mass is None or curve is None:
        return cap
    needs = curve.budgets(config.budget_mass, tokens)
    return [[min(cap, max(LEAST_ADAPTIVE, need)) for need in layer] for layer in needs]


def predicted_layers(
    config: RuntimeConfig, calibration: Calibration, offloaded: Iterable[int]
) -> frozenset[int]:
    """Offloaded layers that are predicted: none in mode "off", never layer 0 or what calibration excludes."""
    if config.prefetch == "off":
        return frozenset()
    excluded = {0, *calibration.unpredicted_layers}
    return frozenset(offloaded) - excluded
