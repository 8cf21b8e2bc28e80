"""Compile every kernel for one architecture, without a GPU: python aot_compile.py 90.

Prints one JSON object: {"unsupported": why} if this Triton cannot build even an
empty kernel for the architecture, else {"failed": {case: error}}. It is run as a
program of its own because the interpreter that the other tests use replaces @triton.jit.

To add a kernel, add a Case. Arguments that are in neither `types` nor
`constants` are 32-bit integers divisible by 16, as strides are.
"""

import importlib
import json
import re
import sys
from dataclasses import dataclass, replace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from offload_runtime.kernels.attend_pieces import STAGES, WARPS
from offload_runtime.kernels.compile_options import FUSED, UNFUSED
from offload_runtime.kernels.masked_prefill import TILES
from offload_runtime.kernels.products import FEW_TOKENS, LEAST_BLOCK, MOST_TOKENS, ONE_TOKEN, Tile


@dataclass(frozen=True)
class Case:
    module: str  # in offload_runtime.kernels
    kernel: str
    types: dict  # argument -> Triton type name
    constants: dict  # argument -> compile-time value
    wide: bool = False  # its loads must be 16 bytes a thread
    num_warps: int = 4
    num_stages: int = 3  # Triton's default
    fused: bool = True  # as the launch says (compile_options.py); else no instruction may multiply and add
    lanes_agree: bool = False  # no lane may add its own product, unrounded, to a number of another lane


def append(dtype: str, dim: int, dim_pad: int) -> Case:
    pointers = dict.fromkeys(("key", "value", "slots", "host_rows"), f"*{dtype}")
    sizes = {"DIM": dim, "DIM_PAD": dim_pad, "SINKS": 4, "RECENT": 64, "KV_HEADS": 8}
    return Case("append", "_append_rows_kernel", pointers | {"lengths": "*i32"}, sizes, num_warps=1)


def radix(kernel: str, streams: int) -> Case:
    """A pass of the radix select over 262,144 scores of eight heads (radix.radix_plan)."""
    pointers = {"scores": "*fp32", "history": "*u8" if streams == 3 else "*fp32"}
    pointers["ages"] = "*i32" if streams == 3 else "*fp32"
    names = ("budgets", "lengths", "hist", "state", "above", "outside", "tokens", "counts")
    sizes = {"CHUNK": 8192, "VEC": 4} | ({"DIGIT": 2, "STREAMS": streams} if kernel == "digit_kernel" else {})
    module = "radix" if kernel == "digit_kernel" else "sticky"
    if kernel == "compact_sticky_kernel":
        sizes["ATTENDED"] = True
    return Case(module, kernel, pointers | dict.fromkeys(names, "*i32"), sizes, num_warps=16)


def count_ages() -> Case:
    pointers = {"history": "*u8", "lengths": "*i32", "ages": "*i32"}
    return Case("history", "count_ages_kernel", pointers, {"CHUNK": 8192}, num_warps=16)


def gather(dtype: str, row: int, row_pad: int, block: int) -> Case:
    pointers = dict.fromkeys(("host_rows", "slots"), f"*{dtype}")
    pointers |= dict.fromkeys(("miss_tokens", "miss_slots", "miss_counts"), "*i32")
    sizes = {"KV_HEADS": 8, "HEADS": 8, "HEADS_PAD": 8, "ROW": row, "ROW_PAD": row_pad, "BLOCK": block}
    sizes |= {"FIRST_SLOT": 68, "PROGRAMS": 32}
    return Case("gather", "_gather_rows_kernel", pointers, sizes, wide=True)


def labels(dtype: str, dim: int, channels: int, bits: int, block: int, block_d: int) -> Case:
    pointers = {"keys": f"*{dtype}", "key_map": "*fp32", "key_mean": "*fp32", "starts": "*i32"}
    pointers |= {"codes": "*fp16" if bits == 16 else "*u8", "scales": "*fp16"}
    sizes = {"KV_HEADS": 8, "DIM": dim, "BLOCK_D": block_d, "R": channels, "BITS": bits, "BLOCK": block}
    return Case("labels", "_make_labels_kernel", pointers, sizes)


def query_labels(dtype: str, dim: int, dim_pad: int, channels: int) -> Case:
    pointers = {"query": f"*{dtype}", "slots": f"*{dtype}", "lengths": "*i32", "scale": "fp32"}
    pointers |= dict.fromkeys(("query_map", "key_mean", "labels", "offsets"), "*fp32")
    sizes = {
        "HEADS": 32,
        "GROUP": 4,
        "DIM": dim,
        "DIM_PAD": dim_pad,
        "R": channels,
        "BLOCK": 64,
        "BLOCK_R": 16,
    }
    sizes |= {"SINKS": 4, "RECENT": 64, "INCLUDE_CURRENT": True}
    return Case("query_labels", "_query_labels_kernel", pointers, sizes)


def scores(bits: int, channels: int, group: int, group_pad: int, pack: int, block: int) -> Case:
    codes, scale_pairs = ("*fp16", "*fp16") if bits == 16 else ("*u8", "*i32")
    pointers = dict.fromkeys(("query_labels", "offsets", "scores"), "*fp32")
    pointers |= {"codes": codes, "scales": scale_pairs, "lengths": "*i32"}
    sizes = {"KV_HEADS": 8, "GROUP": group, "GROUP_PAD": group_pad, "PACK": pack, "R": channels}
    sizes |= {"WIDTH": channels // 2 if bits == 4 else channels, "BITS": bits, "SINKS": 4, "RECENT": 64}
    sizes |= {"ASM": True, "BLOCK": block, "BLOCKS": 8, "STAGES": 4}
    return Case("scores", "_label_scores_kernel", pointers, sizes, wide=bits == 16, lanes_agree=True)


def attend(
    dtype: str,
    dim: int,
    dim_pad: int,
    group_pad: int,
    block: int,
    softcap: bool = False,
    part: int = 0,
    by_slots: bool = False,
) -> Case:
    pointers = dict.fromkeys(("query", "slots"), f"*{dtype}") | {"scale": "fp32", "softcap": "fp32"}
    pointers |= dict.fromkeys(("tokens", "counts", "slot_of_token", "lengths"), "*i32")
    pointers |= dict.fromkeys(("partial", "tops", "sums"), "*fp32")
    sizes = {"KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": group_pad, "DIM": dim, "DIM_PAD": dim_pad, "SINKS": 4}
    sizes |= {"RECENT": 64, "SPLITS": 52, "CHUNK": 320, "BLOCK": block, "SOFTCAP": softcap}
    sizes |= {"UPCAST": False, "STAGES": STAGES, "PART": part}
    if by_slots:
        del pointers["slot_of_token"]
        sizes["slot_of_token"] = None
    if part:
        pointers |= {"stamps": "*i32", "step": "*i32"}
    else:
        sizes |= {"stamps": None, "step": None}  # a launch with None makes it a constant
    return Case("attend_pieces", "_attend_kernel", pointers, sizes, wide=True, num_warps=WARPS)


def combine(dtype: str, dim: int, has_sink: bool) -> Case:
    pointers = {"partial": "*fp32", "tops": "*fp32", "sums": "*fp32", "out": f"*{dtype}"}
    sizes = {"HEADS": 32, "DIM": dim, "BLOCK_D": 32, "SPLITS": 52, "SPLITS_PAD": 64, "HAS_SINK": has_sink}
    if has_sink:
        pointers["sink_logits"] = "*fp32"
    else:
        sizes["sink_logits"] = None  # a launch with None makes it a constant
    return Case("combine_pieces", "_combine_kernel", pointers, sizes, fused=False)


def merge(dtype: str, dim: int, dim_pad: int) -> Case:
    pointers = {"out": f"*{dtype}", "other": f"*{dtype}", "lse": "*fp32", "other_lse": "*fp32"}
    pointers["into"] = "*fp32"
    return Case("merge_attention", "_merge_kernel", pointers, {"DIM": dim, "DIM_PAD": dim_pad, "BLOCK": 32})


def masked_prefill(dtype: str, dim: int, dim_pad: int, window: bool) -> Case:
    pointers = {"query": f"*{dtype}", "rows": f"*{dtype}", "out": f"*{dtype}", "lse": "*fp32"}
    pointers |= {"scale": "fp32", "softcap": "fp32"}
    block_m, block_n, num_warps = TILES[max(dim_pad, 64)]
    sizes = {"HEADS": 16, "GROUP": 2, "DIM": dim, "DIM_PAD": dim_pad, "BLOCK_M": block_m, "BLOCK_N": block_n}
    sizes |= {"WINDOW": window, "SOFTCAP": True, "UPCAST": False}
    return Case(
        "masked_prefill", "_masked_prefill_kernel", pointers, sizes, num_warps=num_warps, num_stages=2
    )


def product_sizes(width: int, tile: Tile, one_token: bool) -> dict:
    sizes = {"WIDTH": width, "ROWS": tile.rows, "BLOCK": tile.block, "UPCAST": False}
    return sizes | {"TOKENS_PAD": 1 if one_token else MOST_TOKENS}


def products(dtype: str, width: int, tile: Tile, one_token: bool, count: int = 3) -> Case:
    names = [f"{part}_{i}" for part in ("weight", "bias", "out") for i in range(count)]
    unused = [f"{part}_{i}" for part in ("weight", "bias", "out") for i in range(count, 3)]
    if count > 1:
        unused.append("residual")
    else:
        names.append("residual")
    sizes = product_sizes(width, tile, one_token) | dict.fromkeys(unused, None)
    pointers = dict.fromkeys(["x", *names], f"*{dtype}")
    return Case(
        "products", "_products_kernel", pointers, sizes, wide=True,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def gated(dtype: str, width: int, tile: Tile, one_token: bool, silu: bool) -> Case:
    sizes = product_sizes(width, tile, one_token) | {"SILU": silu, "gate_bias": None, "up_bias": None}
    pointers = dict.fromkeys(("x", "gate", "up", "out"), f"*{dtype}")
    return Case(
        "gated", "_gated_kernel", pointers, sizes, wide=True,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


CASES = [
    *(products("bf16", 4096, tile, one_token=True) for tile in ONE_TOKEN),
    *(products("fp16", 14336, tile, one_token=False, count=1) for tile in FEW_TOKENS),
    products("bf16", 3584, ONE_TOKEN[0], one_token=True, count=1),
    products("bf16", 256, Tile(8, 256, 4), one_token=True, count=1),  # a guess (input_guess.py)
    *(
        replace(products("bf16", 4, Tile(8, LEAST_BLOCK, 4), one_token, count=1), wide=False)
        for one_token in (True, False)
    ),
    *(gated("bf16", 4096, tile, one_token=True, silu=True) for tile in ONE_TOKEN),
    *(gated("bf16", 3584, tile, one_token=False, silu=False) for tile in FEW_TOKENS),
    masked_prefill("bf16", 64, 64, window=False),
    masked_prefill("fp16", 80, 128, window=True),
    masked_prefill("bf16", 128, 128, window=True),
    masked_prefill("bf16", 256, 256, window=False),
    masked_prefill("bf16", 256, 256, window=True),
    merge("bf16", 128, 128),
    merge("fp16", 80, 128),
    append("bf16", 128, 128),
    append("fp32", 80, 128),
    radix("digit_kernel", 1),
    radix("digit_kernel", 3),
    count_ages(),
    radix("count_outside_kernel", 3),
    radix("compact_sticky_kernel", 3),
    gather("bf16", 256, 256, 16),
    gather("fp32", 160, 256, 8),
    gather("fp16", 32, 32, 128),
    labels("bf16", 128, 32, 4, 1, 128),
    labels("bf16", 128, 32, 4, 64, 32),
    labels("fp16", 256, 128, 8, 64, 32),
    labels("fp32", 80, 16, 16, 64, 32),
    query_labels("bf16", 128, 128, 32),
    query_labels("fp32", 80, 128, 128),
    scores(4, 32, 4, 4, 2, 256),
    scores(4, 32, 1, 1, 8, 512),
    scores(4, 16, 8, 8, 2, 256),
    scores(4, 32, 8, 8, 1, 128),  # a lane has one number of each sum over labels
    scores(8, 64, 1, 4, 2, 128),
    scores(16, 16, 4, 4, 2, 256),
    scores(16, 128, 16, 16, 1, 64),
    attend("bf16", 128, 128, 16, 64),
    attend("bf16", 128, 128, 16, 64, by_slots=True),
    attend("bf16", 128, 128, 16, 64, part=1, by_slots=True),
    attend("bf16", 128, 128, 16, 64, part=2),
    attend("fp16", 80, 128, 16, 64, softcap=True),
    attend("fp32", 256, 256, 16, 16, softcap=True),
    attend("bf16", 16, 16, 16, 128),
    combine("bf16", 128, has_sink=False),
    combine("fp32", 80, has_sink=True),
]


@triton.jit
def _empty_kernel(x):
    pass


def compile_kernel(fn, types: dict, constants: dict, arch: int, **options):
    if "EARLY" in fn.arg_names:  # early_launch.py: on the GPUs that can
        constants = constants | {"EARLY": arch >= 90}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in fn.arg_names}
    aligned = [a for a in fn.arg_names if signature[a].startswith("*") or a not in types | constants]
    source = ASTSource(
        fn=fn,
        signature=signature,
        constexprs={(fn.arg_names.index(a),): value for a, value in constants.items()},
        attrs={(fn.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(case: Case, arch: int) -> None:
    fn = getattr(importlib.import_module(f"offload_runtime.kernels.{case.module}"), case.kernel)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | (
        FUSED if case.fused else UNFUSED
    )
    kernel = compile_kernel(fn, case.types, case.constants, arch, **options)
    wide_load = r"ld\.global\S*\.v4\.b32|cp\.async\.cg"  # cp.async.cg exists at 16 bytes only
    if case.wide and not re.search(wide_load, kernel.asm["ptx"]):
        raise AssertionError("no 16-byte loads in its PTX")
    waits = "griddepcontrol.wait" in kernel.asm["ptx"]
    if "EARLY" in fn.arg_names and waits != (arch >= 90):
        raise AssertionError("it must wait for its inputs exactly where it may start early")
    if not case.fused and "fma." in kernel.asm["ptx"]:
        raise AssertionError("a fused multiply-add in its PTX")
    if case.lanes_agree and (added := added_unrounded(kernel.asm["sass"])):
        raise AssertionError(f"lanes may disagree in a last bit: {added}")
    if kernel.metadata.shared > 99 * 1024:  # what one block may have on sm_86, sm_89 and sm_120
        raise AssertionError(f"{kernel.metadata.shared} bytes of shared memory")


def added_unrounded(sass: str) -> list[str]:
    """Fused multiply-adds whose addend comes from another lane: in a sum over lanes, totals would differ."""
    found, from_lanes = [], set()
    for line in sass.splitlines():
        if shuffled := re.search(r"SHFL\S* \w+, (R\d+),", line):
            from_lanes.add(shuffled[1])
        elif written := re.search(r"\t(?:@!?\w+ )?([A-Z]\S*) (R\d+)", line):
            addend = line.rstrip("; ").split(", ")[-1].split(".")[0]
            if written[1].startswith("FFMA") and addend in from_lanes:
                found.append(line.split("\t")[-1])
            from_lanes.discard(written[2])
    return found


def main(arch: int) -> None:
    try:
        compile_kernel(_empty_kernel, {"x": "*i32"}, {}, arch, num_warps=1)
    except Exception as error:
        print(json.dumps({"unsupported": f"{type(error).__name__}: {error}"[:500]}))
        return
    failed = {}
    for case in CASES:
        try:
            check(case, arch)
        except Exception as error:
            failed[f"{case.kernel} {case.constants}"] = f"{type(error).__name__}: {error}"[:500]
    print(json.dumps({"failed": failed}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
