"""The CUDA C++ sources compile for every GPU that runs them, and what can be read off the machine code."""

import importlib.util
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
LABELS = {**dict(label_defines(32, 4, 4)), "THREADS": 512}
WIDE = {**dict(label_defines(128, 16, 8)), "THREADS": 512}
MORE_THREADS = {**LABELS, "THREADS": 1024}
CASES = {
    "select": (SELECT, LABELS),
    "admit": (ADMIT, LABELS),
    "select by more threads": (SELECT, MORE_THREADS),
    "admit by more threads": (ADMIT, MORE_THREADS),
    "admit wide labels": (ADMIT, WIDE),
    "choose": ((*CHOOSING_SOURCES, "choose_cluster.cu"), {"THREADS": 512}),
    "choose by few": ((*CHOOSING_SOURCES, "choose_cluster.cu"), {"THREADS": 512, "CLUSTER": 4}),
    "resolve": ((*LIST_SOURCES, "resolve_cluster.cu"), {"THREADS": 512}),
    "gather": (("gather_bulk.cu",), {"ROW_BYTES": 512, "GROUP": 16, "STAGES": 4, "CLUSTER": 8}),
}


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def disassembler() -> str | None:
    """cuobjdump of a CUDA toolkit, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    bundled = [] if triton is None or triton.origin is None else [Path(triton.origin).parent]
    places = [str(folder / "backends/nvidia/bin/cuobjdump") for folder in bundled]
    return next(filter(None, map(shutil.which, ["cuobjdump", *places])), None)


def compile_case(case: str, target: str, cluster: int, out: Path) -> str:
    """Compile a case to a cubin; what ptxas says of it."""
    sources, defines = CASES[case]
    text = "".join(f"#define {name} {value}\n" for name, value in {"CLUSTER": cluster, **defines}.items())
    file = out.with_suffix(".cu")
    file.write_text(text + "".join((KERNELS / name).read_text() for name in sources))
    command = ["nvcc", f"-arch={target}", "-std=c++17", "-cubin", "-Xptxas", "-v", "-o", str(out), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def loads_on_their_way(sass: str) -> list[str]:
    """Registers loaded from another CTA that nothing reads before the CTA says it needs the others no more.

    Such a load may come when the other CTA is gone: a launch failure. Global memory has loads of its own
    (LDG), and a fence waits for loads.
    """
    found, loaded = [], set()
    for line in sass.splitlines():
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)(.*?);", line)
        if match is None:
            continue
        name, operands = match[1], re.findall(r"\bR(\d+)\b", match[2])
        if name.startswith("MEMBAR"):
            loaded.clear()
        elif name == "UCGABAR_ARV":
            found += sorted(loaded)
            loaded.clear()
        else:
            is_load = name == "LD" or name.startswith("LD.")
            loaded -= {f"R{number}" for number in operands[1 if is_load else 0 :]}
            loaded |= {f"R{number}" for number in operands[:1] if is_load}
    return found


@needs_nvcc
@pytest.mark.parametrize(("target", "cluster"), [("sm_90", 16), ("sm_90", 8), ("sm_120", 8)])
@pytest.mark.parametrize("case", CASES)
def test_source_compiles(case, target, cluster, tmp_path):
    """cluster: CTAs in a cluster, which the gather has none of."""
    said = compile_case(case, target, cluster, tmp_path / "out")
    assert "wide" in case or " 0 bytes spill stores" in said


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("cluster", [16, 8])
@pytest.mark.parametrize("case", CASES)
def test_no_cta_leaves_while_a_load_from_it_is_on_its_way(case, cluster, tmp_path):
    compile_case(case, "sm_90", cluster, tmp_path / "out")
    command = [disassembler(), "--dump-sass", str(tmp_path / "out")]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "UCGABAR_ARV" in sass or case == "gather"
    assert loads_on_their_way(sass) == []


def test_a_load_that_is_used_too_late_is_found():
    """As ptxas once arranged the admission: the sum stood after the arrival."""
    sass = """
        /*ba60*/              @!P1 LD.E R12, [R10] ;    /* 0x000000000a0c9980 */
        /*ba70*/                   REDUX.SUM.S32 UR4, R6 ;
        /*baa0*/                   UCGABAR_ARV ;
        /*bb10*/                   REDUX.SUM.S32 UR5, R12 ;
"""
    assert loads_on_their_way(sass) == ["R12"]
    assert loads_on_their_way(sass.replace("UR4, R6", "UR4, R12")) == []
    assert loads_on_their_way(sass.replace("REDUX.SUM.S32 UR4, R6", "MEMBAR.ALL.GPU")) == []
