"""Documents an hour, one at a time and with several places, on the same documents and the same model.

    python -m bench.continuous --out bench/results/continuous.json

Weights are random (the Llama-3.1-8B shape), so answers mean nothing and every document gets exactly
--new-tokens. "1" decodes each document after its prefill, "5" fills five places and decodes while
newcomers prefill, "5:no-overlap" decodes between prefills only, "9:sized" gives places the sizes that
the documents need, "9:sized2" those of two places before (spare in places.py). "5:x2" goes through the
documents twice: one at a time, twice as many take twice as long, while several places fill and empty once
a job; from three rounds on "steady_gain" compares the rounds between the first and the last. All use caches
whose memory is made once, and whose time is given apart. Every document and every run is written as soon as
it is known; a run that fails is recorded and the next one goes on. On an H100 the defaults take about three
minutes.
"""

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from offload_runtime import OffloadedModel, RuntimeConfig
from offload_runtime.bench.driven import unit_calibration
from offload_runtime.bench.machine import machine
from offload_runtime.bench.shapes import random_model
from offload_runtime.choosing import Chooser
from offload_runtime.continuous import ContinuousBatch
from offload_runtime.free_place import first_with_place
from offload_runtime.places import sizes_within

# Mixed lengths from 32K to 128K tokens, in no order.
LENGTHS = (65_536, 130_048, 32_768, 98_304, 49_152, 81_920)
TOY: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def load(shape: str, positions: int) -> Any:
    if shape != "toy":
        return random_model(shape, positions)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TOY, max_position_embeddings=positions)).eval()


def greedy() -> Chooser:
    """The likeliest token, whatever it is: no token ends an answer."""
    return Chooser(LogitsProcessorList(), False, frozenset())


def random_prompts(lengths: Sequence[int], vocabulary: int) -> list[torch.Tensor]:
    """The same every time."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=draw) for length in lengths]


class Run:
    """One setting over all documents; `line` is what is known of it so far."""

    def __init__(self, name: str, model: OffloadedModel, ahead: int) -> None:
        self.name, self.model = name, model
        count, *how = name.split(":")
        self.places, self.overlap, self.ahead = int(count), "no-overlap" not in how, ahead
        self.spare = next((int(part[5:] or 0) for part in how if part.startswith("sized")), None)
        self.rounds = next((int(part[1:]) for part in how if part.startswith("x")), 1)
        self.line: dict[str, Any] = {"places": self.places, "overlap": self.overlap, "documents": []}

    def work(self, prompts: list[torch.Tensor], new_tokens: int, save: Any) -> None:
        """Open the caches, then time the documents from the first one's start to the last one's end."""
        started = time.perf_counter()
        needs = [len(prompt) + new_tokens for prompt in prompts]
        sizes = () if self.spare is None else sizes_within(needs, self.places, self.spare)
        batch = self.model.continuous(self.places, max(needs), overlap=self.overlap, place_tokens=sizes)
        batch.limit_ahead = self.ahead
        for cache in batch.session.offloaded.values():
            _ = cache.host.rows  # pinned in the background; waited for here
        layout = batch.session.layout
        self.line["place_tokens"] = layout.rooms
        self.line["pinned_gb"] = round(layout.layers * layout.host_bytes / 1e9, 2)
        self.line["open_s"] = round(time.perf_counter() - started, 2)
        save()
        self._decode(batch, prompts, new_tokens, save)

    def _decode(
        self, batch: ContinuousBatch, prompts: list[torch.Tensor], new_tokens: int, save: Any
    ) -> None:
        chooser = greedy()
        started, waiting, prefill_s = time.perf_counter(), list(enumerate(prompts * self.rounds)), 0.0
        while waiting or batch.running:
            needs = [len(prompt) + new_tokens for _, prompt in waiting]
            chosen = first_with_place(needs, lambda need: batch.place_for(need) is not None)
            if chosen is not None:
                (index, prompt), place = waiting.pop(chosen), batch.place_for(needs[chosen])
                assert place is not None
                began = time.perf_counter()
                batch.join(place, prompt, new_tokens, chooser, index)
                prefill_s += time.perf_counter() - began
            else:
                batch.step()
            for done in batch.take_finished():
                moved = {name: done.moved[name] for name in ("hit_rate", "gather_gb")}
                times = {"ttft_s": round(done.ttft_s, 3), "tpot_s": round(done.tpot_s, 5)}
                at = round(time.perf_counter() - started, 2)
                document = {"document": done.key, "prompt_tokens": done.prompt_tokens, "done_s": at}
                self.line["documents"].append({**document, **times, **moved, "tokens": done.tokens})
                self.line["seconds"], self.line["in_prefills_s"] = at, round(prefill_s, 2)
                self.line["documents_per_hour"] = round(3600 * len(self.line["documents"]) / at, 1)
                save()


def steady_rate(done_s: list[float], round_size: int) -> float | None:
    """Documents an hour from the end of the first round to the end of the last but one, each of the same
    lengths: without the time that filling and emptying places takes. None with fewer than three rounds."""
    ends = done_s[round_size - 1 :: round_size]
    if len(ends) < 3:
        return None
    return round(3600 * round_size * (len(ends) - 2) / (ends[-2] - ends[0]), 1)


def compare(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Documents an hour over one at a time, and how far the tokens are the same (in bf16 other batch sizes
    round differently, so random weights may part at near ties); only of runs that did all documents."""
    whole = [line for line in lines if line.get("complete")]
    base = next((line for line in whole if line["places"] == 1), None)
    if base is None:
        return {}
    expected = {document["document"]: document["tokens"] for document in base["documents"]}
    gains = {}
    for line in whole:
        same = [
            sum(a == b for a, b in zip(expected[d["document"] % len(expected)], d["tokens"], strict=True))
            / len(d["tokens"])
            for d in line["documents"]
        ]
        steady = steady_rate([d["done_s"] for d in line["documents"]], len(expected))
        gains[line["setting"]] = {
            "gain": round(line["documents_per_hour"] / base["documents_per_hour"], 3),
            "steady_gain": steady and round(steady / base["documents_per_hour"], 3),
            "tokens_as_alone": round(sum(same) / len(same), 4),
        }
    return gains


def without_tokens(line: dict[str, Any]) -> dict[str, Any]:
    documents = [
        {name: value for name, value in document.items() if name != "tokens"}
        for document in line["documents"]
    ]
    return {**line, "documents": documents}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="as in bench/shapes.py, or toy (CPU)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument(
        "--settings", nargs="+", default=["1", "5:x2"], help="places[:sized[N]][:no-overlap][:xN]"
    )
    parser.add_argument("--budget", default="2048")
    parser.add_argument("--slots", type=int, help="rows kept on the GPU per layer and KV head (2 x budget)")
    parser.add_argument("--prefetch", default="correct")
    parser.add_argument("--ahead", type=int, default=8, help="prefill chunks launched ahead of the GPU")
    parser.add_argument(
        "--warm-up", type=int, default=16_384, help="tokens of a document done first, untimed"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    ctx = max(*options.lengths, options.warm_up) + options.new_tokens
    plain = load(options.shape, ctx)
    config = RuntimeConfig(ctx=ctx, budget=options.budget, prefetch=options.prefetch, slots=options.slots)
    model = OffloadedModel(plain, config)
    model.calibration = unit_calibration(model.adapter)
    prompts = random_prompts(options.lengths, plain.config.vocab_size)
    lines: list[dict[str, Any]] = []
    job = {name: value for name, value in vars(options).items() if name != "out"}

    def save() -> None:
        report: dict[str, Any] = {"job": job, "machine": machine_facts, "compared": compare(lines)}
        report["results"] = [without_tokens(line) for line in lines]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    machine_facts = machine()
    if options.warm_up:  # compiles kernels and tries attention kernels, which a night does once
        Run("1", model, options.ahead).work([prompts[0][: options.warm_up]], 4, lambda: None)
    for name in options.settings:
        run = Run(name, model, options.ahead)
        run.line = {"setting": name, **run.line}
        lines.append(run.line)
        try:
            run.work(prompts, options.new_tokens, save)
            run.line["complete"] = True
        except Exception as error:  # an out-of-memory of one setting; the others go on
            run.line["error"] = f"{type(error).__name__}: {error}"
        del run
        model.close()
        gc.collect()
        save()
        print(json.dumps(without_tokens(lines[-1])), flush=True)
    print(json.dumps(compare(lines)))


if __name__ == "__main__":
    main()
