"""A JSON file that is there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import RunError


def write_json(file: Path, data: Any, name: str | None = None, ascii_only: bool = True) -> None:
    """Replace the file; RunError, with what it is called (by default its path), when that fails."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(data, indent=1, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise RunError(f"cannot write {name or file}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
