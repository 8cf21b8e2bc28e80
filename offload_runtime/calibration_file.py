"""The calibration file in a model's directory: where it is, what it chooses, whether it suits a run."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .calibration import Calibration
from .config import RuntimeConfig
from .errors import UserError

CALIBRATION_FILE = "calibration.safetensors"  # looked for in the model's directory


def own_calibration(name_or_path: str | Path, rope_scaling: str | None = None) -> Path | None:
    """The calibration file in the model's directory; None when there is none, or for a hub name.

    None for a stretched model too: it has other keys than the one that the file is for.
    """
    file = Path(name_or_path) / CALIBRATION_FILE
    return file if rope_scaling is None and file.is_file() else None


def with_choice(
    settings: dict[str, Any], name_or_path: str | Path, rope_scaling: str | None = None
) -> dict[str, Any]:
    """The settings, with budget, label bits and new rows from the calibration file where the user gave none.

    A calibration file holds them when they were chosen for a quality target.
    """
    own = own_calibration(name_or_path, rope_scaling)
    file = Path(settings["calibration"]) if settings.get("calibration") else own
    if file is None or not file.is_file():
        return settings  # whoever loads it says so
    chosen: dict[str, Any] = dict(Calibration.load(file).provenance)
    if "budget" not in chosen:
        return settings
    # What was chosen before there was new_rows was measured with exact selection.
    new_rows = chosen.get("new_rows", "none")
    bits = int(chosen["label_bits"])
    return {"budget": chosen["budget"], "label_bits": bits, "new_rows": new_rows, **settings}


def check_calibration(calibration: Calibration | None, config: RuntimeConfig, model: PreTrainedModel) -> None:
    """UserError when the calibration is another model's or has another number of label channels."""
    if calibration is None:
        return
    calibration.check(model.config)
    channels = calibration.key_map.shape[2]
    if config.label_channels not in (None, channels):
        raise UserError(
            f"label_channels is {config.label_channels} but the calibration has {channels}; "
            "leave it out or run `ds-offload calibrate` again"
        )
    if config.budget_mass is not None and calibration.mass_curve is None:
        raise UserError(
            "budget_mass needs a calibration that measured what budgets hold and this one did not; "
            "run `ds-offload calibrate` again, on a text of 256 tokens or more"
        )
