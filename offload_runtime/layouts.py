"""The caches' layout of a model and its settings: the plan's and the session's are this one."""

from .cache.layout import KVLayout, biting
from .config import RuntimeConfig, label_width
from .model_check import ModelShape


def make_layout(
    shape: ModelShape,
    config: RuntimeConfig,
    channels: int,
    batch: int,
    capacity: int,
    place_tokens: tuple[int, ...] = (),
) -> KVLayout:
    """channels: label channels of the calibration, before padding; capacity: tokens a sequence can hold.

    place_tokens: of each sequence, how many of them get host memory; by default all.
    """
    budget = config.budget_tokens(capacity)
    windows = tuple(window for window in biting(shape.windows, capacity) if window)
    return KVLayout(
        layers=shape.layers - len(windows),
        batch=batch,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        capacity=capacity,
        budget=budget,
        sinks=config.sinks,
        recent=config.recent,
        slots=config.slot_count(budget, capacity),
        label_channels=label_width(channels),
        label_bits=config.label_bits,
        dtype=shape.dtype,
        windows=windows,
        place_tokens=place_tokens,
    )
