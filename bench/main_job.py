"""The main job at full length: a pass key hidden in 262,144 tokens of prose, and the Llama-3.1-8B shape.

    python -m bench.main_job passkey --text moby_dick.txt --out bench/results/main_job_passkey.json
    python -m bench.main_job bits --text moby_dick.txt --out bench/results/main_job_bits.json
    python -m bench.main_job shape --out bench/results/main_job_llama8b.json

`passkey` runs the embedded model with budgets 1/16 and 2,048 in every prefetch
mode; `bits` compares the logits of `correct` and `off` bit for bit; `shape` runs
random weights of the Llama-3.1-8B shape, which says nothing about answers and
everything about memory and time.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.bench.machine import ROOT, machine
from offload_runtime.demo import ask, build_document, is_right

FIGURES = (
    "ttft_s", "tpot_s", "tpot_median_s", "prompt_tokens", "new_tokens", "hit_rate", "prefetch_recall",
    "gather_gb", "pinned_gb", "gpu_plan_gb", "gpu_decode_peak_gb", "gpu_prefill_peak_gb",
)  # fmt: skip

EMBEDDED = ROOT / "offload_runtime" / "data" / "tiny-256k"

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip


def figures(stats: dict[str, Any]) -> dict[str, Any]:
    return {name: stats[name] for name in FIGURES}


def passkey(ctx: int, text_file: str | None, depth: float, new_tokens: int) -> Iterator[dict[str, Any]]:
    """One line a budget and mode: the answer and what it took."""
    text = None if text_file is None else Path(text_file).read_text(encoding="utf-8")
    # The embedded model's tokens are bytes, with one <bos> in front.
    document = build_document(ctx - new_tokens - 64, depth, 0, text, lambda part: len(part.encode()))
    for budget in ("1/16", 2048):
        for mode in ("correct", "predict", "off"):
            with OffloadedModel.from_pretrained(EMBEDDED, ctx=ctx, budget=budget, prefetch=mode) as om:
                answer = ask(om, document, new_tokens)
                line = {"budget": budget, "prefetch": mode, "expected": document.answer, "answer": answer}
                line |= {"right": is_right(answer, document), **figures(om.stats)}
            yield line


def bits(ctx: int, text_file: str | None, depth: float, new_tokens: int) -> Iterator[dict[str, Any]]:
    """`off` twice and `correct`, each with a prefill of its own: where their logits first differ in a bit."""
    text = None if text_file is None else Path(text_file).read_text(encoding="utf-8")
    document = build_document(ctx - new_tokens - 64, depth, 0, text, lambda part: len(part.encode()))
    for budget in ("1/16", 2048):
        expected: list[torch.Tensor] = []
        for mode in ("off", "off", "correct"):
            with OffloadedModel.from_pretrained(EMBEDDED, ctx=ctx, budget=budget, prefetch=mode) as om:
                ids = om.tokenizer(document.text, return_tensors="pt").input_ids.to(om.model.device)
                out = om.generate(
                    ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
                logits = [step.cpu() for step in out.logits]
                expected = expected or logits
                same = [torch.equal(a, b) for a, b in zip(logits, expected, strict=True)]
                line: dict[str, Any] = {"budget": budget, "prefetch": mode, "tokens": ids.shape[1]}
                # Step 0 is what the prefill gave.
                line["first_different_step"] = None if all(same) else same.index(False)
            yield line | {"prefill": om.stats["prefill"], "new_tokens": new_tokens}


def shape(ctx: int, new_tokens: int, modes: list[str]) -> Iterator[dict[str, Any]]:
    """The Llama-3.1-8B shape with random weights: one line a budget and mode."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))
        torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, LLAMA_8B["vocab_size"], (1, ctx - new_tokens), device="cuda")
    for setting in modes:
        budget, mode = setting.split(":")
        config = RuntimeConfig(ctx=ctx, budget=budget, prefetch=mode)
        with OffloadedModel(model, config) as om:
            om.generate(ids, max_new_tokens=new_tokens, do_sample=False)
            line = {"budget": budget, "prefetch": mode, **figures(om.stats)}
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", choices=("passkey", "bits", "shape"))
    parser.add_argument("--ctx", type=int, default=262144)
    parser.add_argument("--text", help="a long text file for the haystack")
    parser.add_argument("--depth", type=float, default=0.4)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--modes", nargs="+", default=["1/16:correct", "2048:correct", "2048:off"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    report: dict[str, Any] = {"job": options.job, "ctx": options.ctx, "machine": machine(), "results": []}
    if options.job in ("passkey", "bits"):
        job = passkey if options.job == "passkey" else bits
        lines = job(options.ctx, options.text, options.depth, options.new_tokens)
    else:
        lines = shape(options.ctx, options.new_tokens, options.modes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for line in lines:  # written line by line: an interrupted run keeps what it has
        print(json.dumps(line), flush=True)
        report["results"].append(line)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
