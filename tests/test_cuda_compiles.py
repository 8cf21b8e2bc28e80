"""The CUDA C++ sources compile for every GPU that runs them, and spill no registers with the usual labels."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from offload_runtime.kernels.cluster_launch import (
    ADMITTING_SOURCES,
    CHOOSING_SOURCES,
    LIST_SOURCES,
    SCORING_SOURCES,
    label_defines,
)

KERNELS = Path(__file__).parent.parent / "kernels"
SELECT, ADMIT = (*SCORING_SOURCES, "select_cluster.cu"), (*ADMITTING_SOURCES, "admit_cluster.cu")
SPILLED_BYTES = 8  # two registers around a warp's collective, not in a loop
LABELS = {**dict(label_defines(32, 4, 4)), "THREADS": 512}
WIDE = {**dict(label_defines(128, 16, 8)), "THREADS": 512}
CASES = {
    "select": (SELECT, LABELS),
    "admit": (ADMIT, LABELS),
    "admit wide labels": (ADMIT, WIDE),
    "choose": ((*CHOOSING_SOURCES, "choose_cluster.cu"), {"THREADS": 512}),
    "choose by few": ((*CHOOSING_SOURCES, "choose_cluster.cu"), {"THREADS": 512, "CLUSTER": 4}),
    "resolve": ((*LIST_SOURCES, "resolve_cluster.cu"), {"THREADS": 512}),
    "gather": (("gather_bulk.cu",), {"ROW_BYTES": 512, "GROUP": 16, "STAGES": 4, "CLUSTER": 8}),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("target", "cluster"), [("sm_90", 16), ("sm_90", 8), ("sm_120", 8)])
@pytest.mark.parametrize("case", CASES)
def test_source_compiles(case, target, cluster, tmp_path):
    """cluster: CTAs in a cluster, which the gather has none of."""
    sources, defines = CASES[case]
    text = "".join(f"#define {name} {value}\n" for name, value in {"CLUSTER": cluster, **defines}.items())
    file = tmp_path / "kernel.cu"
    file.write_text(text + "".join((KERNELS / name).read_text() for name in sources))
    command = [
        "nvcc",
        f"-arch={target}",
        "-std=c++17",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert spilled is not None
    assert "wide" in case or int(spilled[1]) <= SPILLED_BYTES
