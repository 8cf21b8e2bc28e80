"""Saving that cannot finish: a full disk and a killed process leave nothing broken behind."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offload_runtime import snapshot
from offload_runtime.errors import RunError, UserError

from .models import offloaded, random_llama
from .test_snapshot import SETTINGS, saved_to


@pytest.fixture
def model(device):
    return random_llama(layers=2, device=device)


def test_disk_full(tmp_path, model, monkeypatch):
    """A file size limit ends the writing half-way, as a full disk would (EFBIG for ENOSPC)."""
    saved_to(tmp_path / "doc", model)
    before = {file.name: file.read_bytes() for file in (tmp_path / "doc").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunError, match="cannot save the cache") as refusal:
            saved_to(tmp_path / "doc", model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "doc").iterdir()} == before
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match=r"0\.00 GB are free"):
        saved_to(tmp_path / "doc", model)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_really_full_disk(tiny_disk, model, monkeypatch):
    plenty = shutil.disk_usage(tiny_disk)._replace(free=1 << 40)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: plenty)  # it filled up after the check
    with pytest.raises(RunError, match="No space left"):
        saved_to(tiny_disk / "doc", model)
    assert list(tiny_disk.iterdir()) == []


SLOW_SAVE = """
import sys, time
from pathlib import Path
from offload_runtime import snapshot
from tests.models import random_llama
from tests.test_snapshot import saved_to
write = snapshot.write_tensors
def slow_write(path, tensors):
    record = write(path, tensors)
    if path.name == "layer-001.bin":
        print("writing", flush=True)
        time.sleep(60)
    return record
snapshot.write_tensors = slow_write
saved_to(Path(sys.argv[1]), random_llama(layers=2))
"""


@pytest.mark.parametrize("older", [False, True])
def test_killed_while_writing(tmp_path, older):
    """Nothing of the killed write is taken for a snapshot, the older one stays, the next save cleans up."""
    model, target = random_llama(layers=2), tmp_path / "doc"
    if older:
        saved_to(target, model)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, str(target)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    saved_to(tmp_path / "other", model)  # another save nearby leaves the one at work alone
    part = next(tmp_path.glob(".doc.*.partial"))
    child.kill()
    child.wait()
    assert part.is_dir()
    runtime = offloaded(model, **SETTINGS)
    if older:
        assert runtime.load_cache(target) == 50
    else:
        with pytest.raises(UserError, match="no saved cache"):
            runtime.load_cache(target)
    saved_to(target, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doc", "other"]
    assert runtime.load_cache(target) == 50


def test_a_write_at_work_is_not_a_leftover(tmp_path):
    from offload_runtime.snapshot_files import atomic_directory, remove_leftovers

    with atomic_directory(tmp_path / "doc") as part:
        remove_leftovers(tmp_path / "doc")
        assert part.is_dir()


def test_killed_between_the_two_renames(tmp_path, model):
    saved_to(tmp_path / "doc", model)
    (tmp_path / "doc").rename(tmp_path / ".doc.replaced")
    assert offloaded(model, **SETTINGS).load_cache(tmp_path / "doc") == 50
    saved_to(tmp_path / "doc", model)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]
