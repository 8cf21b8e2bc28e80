"""What the benchmarks rely on: rows that survive failures, kernels put into the right group."""

import json

import torch

from bench.prefill_profile import breakdown, group_of
from bench.rows import Rows


def test_rows_are_on_disk_after_each_and_failures_are_rows(tmp_path):
    rows = Rows(tmp_path / "deep" / "out.json", {"shape": "toy"}, limit_s=100)

    def no_room():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmany lines")

    def wrong():
        raise ValueError("another\nmistake")

    assert rows.add("good", lambda: {"value": 1})
    assert json.loads(rows.out.read_text())["rows"][0]["value"] == 1
    assert not rows.add("large", no_room)
    assert not rows.add("bad", wrong)
    assert not rows.add("long", lambda: {"value": 2}, expected_s=1000)
    good, large, bad, long = json.loads(rows.out.read_text())["rows"]
    assert "error" not in good
    assert (large["out_of_memory"], large["error"]) == (True, "CUDA out of memory.")
    assert (bad["error"], "out_of_memory" in bad) == ("another", False)
    assert "skipped" in long


def test_kernels_by_group():
    names = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::bfloat16_t>>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_128x128x128": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
        "Memcpy DtoH (Device -> Pinned)": "rows out",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies on the GPU",
        "void at::native::vectorized_elementwise_kernel<4, silu_kernel>": "elementwise",
        "_make_labels_kernel": "labels",
        "_merge_kernel": "merge",
        "something_else": "other",
    }
    assert {name: group_of(name) for name in names} == names
    figures = breakdown([("_merge_kernel", 1.0), ("Memcpy DtoH", 5.0), ("_merge_kernel", 0.5)], wall_s=2.0)
    assert figures["groups_s"] == {"rows out": 5.0, "merge": 1.5}
    assert figures["idle_s"] == 0.5  # what is on the link is no work of the compute stream
    assert figures["launches"] == 3
