"""One line of the doctor's report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, whether it is fine, and what to do if it is not."""

    name: str
    value: str
    ok: bool = True
    fix: str = ""
