"""Imports point one way: kernels <- cache <- prefetch <- offload_runtime <- bench, tests."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.jobs_helpers import environment

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("kernels", "cache", "prefetch", "offload_runtime")  # each may import itself and those before it
TRANSFORMERS = {
    "adapter.py",
    "arguments.py",  # GenerationConfig's type
    "architectures.py",  # a config's type
    "cli_chat.py",  # streamer
    "cli_model.py",  # a config's type
    "hf_cache.py",  # its Cache class
    "loading.py",
    "calibration_file.py",  # a model's type
    "calibration_collect.py",
    "cli_generate.py",  # tokenizer and streamer
    "cli_progress.py",  # its loading bar
    "engine.py",
    "fitting.py",  # a config's type
    "generation.py",
    "model_check.py",
    "planner.py",  # a config's type
    "weights.py",
}
PYNVML = {"doctor_gpu.py"}
MAY_REACH_BENCH = "cli_bench.py"  # the command, which imports it only when it runs


def files(layer: str) -> list[Path]:
    folder = ROOT / layer
    return sorted(folder.glob("*.py")) if layer == "offload_runtime" else sorted(folder.rglob("*.py"))


def imports(file: Path, layer: str) -> Iterator[str]:
    """Absolute names of everything a file imports, relative imports resolved."""
    package = ["offload_runtime"] if layer == "offload_runtime" else ["offload_runtime", layer]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> str | None:
    """The layer that an imported name belongs to, None when it is not ours."""
    parts = name.split(".")
    if parts[0] in ("bench", "tests", *LAYERS[:3]):
        return parts[0]
    if parts[0] != "offload_runtime":
        return None
    if parts[1:2] == ["bench"]:
        return "bench"
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS[:3] else "offload_runtime"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_points_up(layer: str) -> None:
    allowed = {None, *LAYERS[: LAYERS.index(layer) + 1]}
    assert files(layer)
    for file in files(layer):
        for name in imports(file, layer):
            if layer != "offload_runtime" and name == "offload_runtime":
                continue  # the package itself, on the way to a lower layer
            if file.name == MAY_REACH_BENCH and layer_of(name) == "bench":
                continue
            assert layer_of(name) in allowed, f"{file.name} imports {name}"


def test_bench_is_imported_when_the_command_runs() -> None:
    script = (
        "import sys, offload_runtime.cli; "
        "sys.exit(any(name.startswith('offload_runtime.bench') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment(), check=False).returncode == 0
    benches = files("bench")
    assert benches
    for file in benches:
        assert "tests" not in {layer_of(name) for name in imports(file, "bench")}


@pytest.mark.parametrize(("library", "allowed"), [("transformers", TRANSFORMERS), ("pynvml", PYNVML)])
def test_libraries_stay_where_they_belong(library: str, allowed: set[str]) -> None:
    found = {
        file.name if layer == "offload_runtime" else f"{layer}/{file.name}"
        for layer in LAYERS
        for file in files(layer)
        if any(name.split(".")[0] == library for name in imports(file, layer))
    }
    assert found == allowed


def test_the_check_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("from ..prefetch.scheduler import Prefetcher\nfrom .. import engine\nimport bench.run\n")
    assert layer_of("offload_runtime.bench.compare") == "bench"
    layers = {layer_of(name) for name in imports(file, "cache")}
    assert {"prefetch", "offload_runtime", "bench"} <= layers
