"""The sidecar OUT.jsonl.meta.json: the settings a job's output was made with."""

import json
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..json_file import write_json

META_SUFFIX = ".meta.json"
SHOWN = 60  # characters of a setting in a message; a prompt template is longer


def meta_file(output: Path) -> Path:
    return output.with_name(output.name + META_SUFFIX)


def check_meta(output: Path, settings: dict[str, Any], has_lines: bool, force: bool) -> None:
    """Write the sidecar of a new output; UserError when the lines that are there have other settings.

    force: go on all the same; the sidecar then lists the settings before.
    """
    file = meta_file(output)
    settings = json.loads(json.dumps(settings))  # as they will be read back
    old = read_meta(file)
    if not has_lines or old is None:
        if has_lines and not force:
            raise UserError(
                f"--output {output} has lines but no {file.name}, so it is not known what made them; "
                "choose another output or give --force"
            )
        write_meta(file, settings, [])
        return
    difference = differing(old["settings"], settings)
    if difference and not force:
        raise UserError(
            f"--output {output} was made with other settings ({difference}); "
            "choose another output, or give --force to go on in it"
        )
    if difference:
        write_meta(file, settings, [*old["earlier_settings"], old["settings"]])


def differing(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "ctx: 8192, now 4096", at most three of them; empty when they are the same."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = [f"{name}: {short(old.get(name))}, now {short(new.get(name))}" for name in names[:3]]
    return "; ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def read_meta(file: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}; move it and its output away") from error
    if not isinstance(meta, dict) or "settings" not in meta or "earlier_settings" not in meta:
        raise UserError(f"{file} is not the settings of a job; move it away")
    return meta


def write_meta(file: Path, settings: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """The whole file or nothing."""
    meta = {"ds_offload": __version__, "settings": settings, "earlier_settings": earlier}
    write_json(file, meta, ascii_only=False)
