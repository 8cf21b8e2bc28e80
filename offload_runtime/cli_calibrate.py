"""`ds-offload calibrate`: label maps for a model, from the user's own text."""

import os
from pathlib import Path

from rich.console import Console

from .calibrate_command import calibrate
from .cli_generate import check_file
from .cli_model import config_of
from .cli_progress import Working, quiet_unless_terminal
from .engine import choose_device
from .errors import UserError
from .model_check import check_config, check_label_channels
from .model_source import ModelSource


def run_calibrate(
    source: ModelSource,
    text_files: list[Path],
    method: str,
    channels: int,
    out: Path | None,
    tokens: int,
    seed: int,
    channels_from: Path | None = None,
) -> None:
    """Check everything, then calibrate; the file is written whole or not at all."""
    for file in text_files:
        check_file(str(file), "text file")
    if channels_from is not None:
        check_file(str(channels_from), "--channels-from")
        method = "channels" if method == "projection" else method  # the default is not in such a file
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"--out {out} cannot be written: no writable folder {out.parent}")
    if channels < 1 or tokens < 1:
        raise UserError("--channels and --tokens must be at least 1")
    place = choose_device(source.device)
    check_label_channels(channels, check_config(config_of(source)))
    console = Console(stderr=True)
    quiet_unless_terminal()
    with Working(console, "calibrating") as bar:
        written = calibrate(
            source.name_or_path, text_files, method, channels, out, tokens, seed, str(place), bar.update,
            channels_from, **source.loading(),
        )  # fmt: skip
    console.print(f"wrote {written}", style="dim", highlight=False, soft_wrap=True)
