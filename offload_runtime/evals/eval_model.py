"""A model under evaluation: its tokenizer at once, its weights when the first cell needs them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..calibrate_command import calibrate_text, read_texts
from ..calibration import Calibration, config_hash
from ..calibration_file import own_calibration
from ..cli_model import config_of, load, plan_of
from ..config import CALIBRATION_TOKENS, DEFAULT_LABEL_CHANNELS
from ..engine import OffloadedModel, choose_device
from ..errors import RunError, UserError
from ..loading import load_tokenizer
from ..model_check import check_config, first_line
from ..model_source import ModelSource
from ..planner import require
from .grid import Setting


class EvalModel:
    """One model directory or hub name and the label maps for every R that is asked of it.

    calibration: a file in place of the one in the model's directory. hash: of its config and of every
    file that label maps come from; results are kept under it.
    """

    def __init__(
        self,
        source: ModelSource,
        seed: int,
        calibrate_on: list[Path],
        out: Path,
        calibration: Path | None = None,
    ) -> None:
        self.source, self.seed, self.calibrate_on, self.out = source, seed, calibrate_on, out
        self.file = calibration or own_calibration(source.name_or_path, source.rope_scaling)
        self.name = source.label
        self.config = config_of(source)
        self.shape = check_config(self.config)
        maps = [] if self.file is None else [self.file]
        self.hash = f"{config_hash(self.config)}-{digest_of([*maps, *calibrate_on])}"
        self.tokenizer = load_tokenizer(source.name_or_path, **source.hub())
        self.loaded: OffloadedModel | None = None

    def base(self) -> OffloadedModel:
        """The loaded model; its weights are shared by all settings."""
        if self.loaded is None:
            try:
                file = None if self.file is None else str(self.file)
                self.loaded = load(self.source, {"calibration": file})
            except (OSError, ValueError, ImportError) as error:
                if isinstance(error, UserError):
                    raise
                name = self.source.name_or_path
                raise RunError(f"cannot load model {name}: {first_line(error)}") from error
        return self.loaded

    def check(self, setting: Setting, tokens: int) -> None:
        """RunError with the numbers when a sequence of that many tokens does not fit."""
        place = choose_device(self.source.device)
        require(plan_of(self.source, setting.config(tokens, self.seed), self.config, place, tokens))

    def open(self, setting: Setting, ctx: int, **settings: Any) -> OffloadedModel:
        """The model under one setting; close() it afterwards."""
        base = self.base()
        config = setting.config(ctx, self.seed, **settings)
        return OffloadedModel(base.model, config, self.tokenizer, self.calibration(setting.channels))

    def calibration(self, channels: int | None) -> Calibration | None:
        """The model's own where R fits it, else one made from --calibrate-on and kept in the output folder.

        None, and so the prompt's own start, where there is neither.
        """
        own = self.base().calibration
        if channels is None or (own is not None and own.key_map.shape[2] == channels):
            return own
        if not self.calibrate_on:
            return None
        file = self.out / f"calibration-{self.name}-{self.hash}-{channels}.safetensors"
        if not file.is_file():
            text = read_texts(self.calibrate_on)
            calibrate_text(
                self.base().adapter, self.tokenizer, text, self.name, "projection", channels,
                CALIBRATION_TOKENS, self.seed, None,
            ).save(file)  # fmt: skip
        return Calibration.load(file)

    def labels(self, setting: Setting) -> dict[str, Any]:
        """R and where this setting's label maps come from, for the record."""
        made = self.calibration(setting.channels)
        if made is None:
            return {"label_channels": setting.channels or DEFAULT_LABEL_CHANNELS, "labels_from": "prompt"}
        source = "calibration file" if made is self.base().calibration else "--calibrate-on"
        return {"label_channels": made.key_map.shape[2], "labels_from": source}

    def close(self) -> None:
        if self.loaded is not None:
            self.loaded.close()
            self.loaded = None


def digest_of(files: Iterable[Path]) -> str:
    """A short hash of the files' bytes, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:8]
