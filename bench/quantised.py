"""The Llama-3.1-8B shape with 4-bit weights at 262,144 tokens, the whole process under 16 GB of GPU memory.

    python -m bench.quantised --out bench/results/quantised_llama8b.json

Random weights, drawn on the GPU and quantised on loading by transformers' own
bitsandbytes loader: time and memory, nothing about answers. The cap counts what
CUDA itself takes (its context and its libraries) as well as PyTorch's allocations.
Needs bitsandbytes and accelerate, which may lie in a folder on PYTHONPATH
(pip install --no-deps --target FOLDER bitsandbytes accelerate), and 50 GB of host
memory. A budget is left out when --seconds would not be enough for it.
Toy size on a CPU: --shape toy --ctx 1024 --new-tokens 5 --budgets 64.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.bench.machine import machine
from offload_runtime.bench.main_job import LLAMA_8B, figures
from offload_runtime.cli_options import DTYPES
from offload_runtime.errors import RunError
from offload_runtime.loading import quantisation
from offload_runtime.memory import measure
from offload_runtime.weights import weight_bytes

GB = 1e9
# Kept of the cap for what libraries load later (cuBLAS, cuDNN, CuPy's and bitsandbytes' kernels):
# an assumption, which each row's process_peak_gb puts to the test.
LIBRARIES_GB = 0.5
TOY = LLAMA_8B | {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"llama-3.1-8b": LLAMA_8B, "toy": TOY}


def random_weights(config: LlamaConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """A bf16 checkpoint in host memory, drawn on the device one parameter at a time."""
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in empty.named_parameters():
        drawn = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)  # norms
        if parameter.dim() > 1:
            drawn.normal_(std=config.initializer_range, generator=generator)
        weights[name] = drawn.cpu()
    return weights


def load_quantised(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=random_weights(config, device), dtype=dtype,
        device_map={"": device}, quantization_config=quantisation("bnb-4bit", config, dtype),
    )  # fmt: skip


def context_bytes(device: torch.device) -> int:
    """GPU memory in use that PyTorch's allocator does not count: the CUDA context. Alone on the GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def cap_memory(device: torch.device, cap_gb: float) -> int:
    """Limit this process to cap_gb, context and libraries included; returns the context's bytes."""
    torch.zeros(1, device=device)
    context = context_bytes(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction((cap_gb * GB - LIBRARIES_GB * GB - context) / total, device)
    return context


def row(model: LlamaForCausalLM, ids: torch.Tensor, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """One setting's figures, or the error that kept it from running."""
    line: dict[str, Any] = {name: str(value) for name, value in settings.items()}
    on_gpu = model.device.type == "cuda"
    try:
        with OffloadedModel(model, RuntimeConfig(ctx=ids.shape[1] + steps, **settings)) as om:
            om.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
            line |= figures(om.stats) | {name: om.stats[name] for name in ("weights_gb", "gpu_cache_gb")}
            line |= {"fitted": om.fitted, "cuda_graph": om.stats["cuda_graph"]}
            if on_gpu:
                line["reserved_peak_gb"] = torch.cuda.max_memory_reserved() / GB
                line["context_gb"] = context_bytes(model.device) / GB
                line["process_peak_gb"] = line["reserved_peak_gb"] + line["context_gb"]
    except (RuntimeError, RunError) as error:  # out of memory is a RuntimeError
        line["error"] = f"{type(error).__name__}: {error}"[:500]
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--cap-gb", type=float, default=16.0)
    parser.add_argument("--budgets", nargs="+", default=["1/16", "2048"])
    parser.add_argument("--seconds", type=float, default=150.0, help="for all of it")
    parser.add_argument("--chunk-tokens", type=int, default=4096, help="half of the default: 0.7 GB less")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options, started = parser.parse_args(), time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    report: dict[str, Any] = {"job": "quantised", "shape": options.shape, "ctx": options.ctx}
    report |= {"cap_gb": options.cap_gb if on_gpu else None, "machine": machine(), "results": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if on_gpu:
        report["context_at_start_gb"] = cap_memory(device, options.cap_gb) / GB
    before = time.perf_counter()
    config = LlamaConfig(**SHAPES[options.shape])
    model = load_quantised(config, device, getattr(torch, options.dtype))
    report |= {"load_s": time.perf_counter() - before, "packed_weights_gb": weight_bytes(model) / GB}
    if on_gpu:
        report |= {"load_peak_gb": torch.cuda.max_memory_allocated() / GB}
        torch.cuda.empty_cache()
        report |= {"free_after_load_gb": (measure(str(device)).gpu or 0) / GB}
    prompt = options.ctx - options.new_tokens
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    options.out.write_text(json.dumps(report, indent=1) + "\n")  # what loading took, should no row end
    lasted = 0.0  # seconds of the last row
    for budget in options.budgets:  # written row by row: an interrupted run keeps what it has
        settings = {"budget": budget, "fit": True, "chunk_tokens": options.chunk_tokens}
        began = time.perf_counter()
        if began - started + lasted > options.seconds:
            line: dict[str, Any] = {"budget": budget, "error": f"not reached in {options.seconds:.0f} s"}
        else:
            line = row(model, ids, settings, options.new_tokens)
            lasted = time.perf_counter() - began
            line["row_s"] = lasted
        print(json.dumps(line), flush=True)
        report["results"].append(line)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
