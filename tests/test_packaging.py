"""The package as it is installed, and the folder named kernels beside Hugging Face's package of that name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "kernels/topk.py",
    "cache/layout.py",
    "prefetch/scheduler.py",
    "bench/compare.py",
    "data/prose.txt",
    "data/tiny-256k/config.json",
    "data/tiny-256k/model.safetensors",
    "data/tiny-256k/tokenizer.json",
    "py.typed",
    "cli.py",
)


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run code from the repository root, with the root in front of `path`, as `python -c` does there."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "PYTHONPATH")
    }
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_folders_are_namespaces() -> None:
    for folder in ("kernels", "cache", "prefetch", "bench"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "offload_runtime" / folder
        assert link.is_dir()
        assert link.resolve() == ROOT / folder


def test_transformers_imports_from_the_root() -> None:
    done = python("from transformers import LlamaForCausalLM; import offload_runtime.kernels.topk")
    assert done.returncode == 0, done.stderr


def test_another_package_named_kernels_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OTHER = True\n")
    done = python("import kernels; print(kernels.OTHER)", tmp_path)
    assert done.stdout == "True\n", done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout to build in."""
    target = tmp_path_factory.mktemp("source") / "ds-offload"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "*.egg-info"
    )
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    return target


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a wheel or an sdist with the setuptools at hand."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = target.iterdir()
    return built


def test_wheel_holds_everything(source: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(build(source, "wheel", tmp_path)).namelist()
    for name in NEEDED:
        assert f"offload_runtime/{name}" in names
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"offload_runtime"}
    assert not any("bench/results/" in name for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    (tmp_path / "wheel").mkdir()
    archive = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    names = zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "wheel")).namelist()
    for name in NEEDED:
        assert f"offload_runtime/{name}" in names
