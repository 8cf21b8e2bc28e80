"""Jobs stand above the runtime: only the batch command imports them, and listing documents needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

from .jobs_helpers import ROOT, environment

PACKAGE = ROOT / "offload_runtime"
MAY_IMPORT_JOBS = {"cli_batch_run.py"}
MAY_IMPORT_TORCH = {"model_answers.py"}


def modules(file: Path) -> set[str]:
    """Names after `import` and `from` in a file, dots included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_only_the_command_imports_jobs() -> None:
    users = {
        file.name
        for folder in (PACKAGE, ROOT / "kernels", ROOT / "cache", ROOT / "prefetch")
        for file in folder.glob("*.py")
        if any("jobs" in name.split(".") for name in modules(file))
    }
    assert users == MAY_IMPORT_JOBS


def test_only_the_model_needs_torch() -> None:
    roots = {"torch", "transformers"}
    users = {f.name for f in (PACKAGE / "jobs").glob("*.py") if roots & {m.split(".")[0] for m in modules(f)}}
    assert users == MAY_IMPORT_TORCH
    script = "import offload_runtime.jobs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=environment(), check=False).returncode == 0
